"""Stages on `transformers.Trainer`: one step's mean over processes, rates by part, continuing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from etcbench.errors import UsageError
from etcbench.packing import PackedBatch, Packer, Shares
from etcbench.training.log import LossCurve, last_complete
from etcbench.training.model import CompressionModel
from etcbench.training.sharding import check_division
from etcbench.training.stage import Stage, part_of

START = 8  # samples by which an auxiliary loss sets its start
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class CompressionTrainer(Trainer):
    """Trainer whose step is the same however many processes and passes it is divided into.

    Each part of the loss is a mean over something (answers, samples, pictures) that batches hold
    in different numbers. Before a step the processes count what the whole step holds, and every
    batch's means get their share (`Shares`), so that the sum of the gradients is that of one batch.
    """

    def __init__(self, model: CompressionModel, *args: Any, stage: Stage, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        check_division(self.accelerator.state, model.unit)
        self.stage = stage
        self._trained = model.trained_names()
        self._figures: dict[str, list[tuple[Tensor, float | Tensor]]] = {}
        self._seen = {"samples": 0, "tokens": 0}
        self._since = (time.monotonic(), 0)

    # One step -------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Fetch the passes of a step and give each its share of the step's means."""
        found, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches: list[PackedBatch] = [inputs["batch"] for inputs in found]
        counted = [(float(b.answers), float(b.samples), float(b.pictures)) for b in batches]
        counts = torch.tensor(counted, device=device)
        total = self.accelerator.reduce(counts.sum(0), "sum").clamp_min(1e-12)
        # Trainer averages over passes, and whatever joins the processes over processes.
        scale = len(batches) * self.accelerator.num_processes / total
        for batch, share in zip(batches, counts * scale, strict=True):
            batch.shares = Shares(*share.unbind())
            if not batch.pictures:
                batch.shares = replace(batch.shares, samples=0.0)  # a placeholder may be there
        return found, None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Run the model and keep the parts of the loss for the log."""
        result = model(**inputs)
        batch: PackedBatch = inputs["batch"]
        self._seen["samples"] += batch.samples
        self._seen["tokens"] += batch.tokens
        shares = {"ce": batch.shares.answers, "accuracy": batch.shares.answers}
        shares["naming"] = batch.shares.pictures
        for name, value in result.items():
            if name not in ("loss", "auxiliary"):
                share = shares.get(name, batch.shares.samples)
                self._figures.setdefault(name, []).append((value.detach() * share, share))
        if self.accelerator.unwrap_model(model).auxiliary is not None:
            # Shares of a step add up to one for each pass; samples of text only add nothing.
            weighted = result.get("auxiliary", 0.0 * result["loss"]).detach() * batch.shares.samples
            self._figures.setdefault("auxiliary", []).append((weighted, 1.0))
        return (result["loss"], result) if return_outputs else result["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the loss since the last record, the speed, and the time that is left."""
        if "loss" in logs:
            logs |= self._parts()
            if logs.get("ce") and "auxiliary" in logs:
                logs["auxiliary_over_ce"] = round(logs["auxiliary"] / logs["ce"], 4)
            logs |= self._speed()
        super().log(logs, *args, **kwargs)

    def _parts(self) -> dict[str, float]:
        """Mean of each figure over all processes."""
        own = {
            name: (
                float(sum(value.float() for value, _ in found)),
                float(sum(share for _, share in found)),
            )
            for name, found in self._figures.items()
        }
        self._figures = {}
        everywhere: list[dict[str, tuple[float, float]]] = gather_object([own])
        means = {}
        for name in own:
            pairs = [there[name] for there in everywhere if name in there]
            weight = sum(share for _, share in pairs)
            means[name] = round(sum(value for value, _ in pairs) / weight, 6) if weight else 0.0
        return means

    def _speed(self) -> dict[str, float]:
        """Measure samples and tokens per second of all processes since the last record."""
        now, step = time.monotonic(), self.state.global_step
        seconds, steps = now - self._since[0], step - self._since[1]
        everywhere: list[dict[str, int]] = gather_object([dict(self._seen)])
        speed = {
            f"{what}_per_second": round(sum(there[what] for there in everywhere) / seconds, 2)
            for what in self._seen
        }
        left = (self.state.max_steps - step) * seconds / max(steps, 1)
        self.restart_clock()
        return {**speed, "processes": len(everywhere), "eta_seconds": round(left)}

    def restart_clock(self) -> None:
        """Begin to measure speed."""
        self._seen = {"samples": 0, "tokens": 0}
        self._since = (time.monotonic(), self.state.global_step)

    # Optimiser and weights ------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with one learning rate per part; biases and norms are not decayed."""
        model = self.model if model is None else model
        assert model is not None
        if self.optimizer is not None:
            return self.optimizer
        stage = self.stage
        auxiliary = stage.auxiliary_learning_rate
        rates = {
            "vision tower": stage.vision_learning_rate,
            "auxiliary": stage.learning_rate if auxiliary is None else auxiliary,
        }
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rate = rates.get(part_of(name), stage.learning_rate)
                decay = stage.weight_decay if name in decayed else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
        parameters = [
            {"params": part, "lr": rate, "weight_decay": decay}
            for (rate, decay), part in groups.items()
        ]
        self.optimizer = torch.optim.AdamW(parameters, betas=stage.betas)
        return self.optimizer

    def trained_state(self) -> dict[str, Tensor]:
        """Collect what is trained, on the CPU; every process has to take part."""
        if self.accelerator.distributed_type in SHARDED:
            # What is divided comes together on the first process; the others get nothing.
            whole = self.accelerator.get_state_dict(self.model_wrapped) or {}
        else:
            whole = self.accelerator.unwrap_model(self.model).state_dict()
        return {name: whole[name].cpu().contiguous() for name in self._trained if name in whole}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained; the rest is the backbone's, which a continued run loads again."""
        state = self.trained_state()
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


class Progress(TrainerCallback):
    """Tell the model how much of the stage is done, for objectives that change on the way."""

    def __init__(self, model: CompressionModel) -> None:
        self.model = model

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the share of the steps."""
        self.model.progress = state.global_step / max(state.max_steps, 1)


def _pictured(data: Any) -> list[Any]:
    """Take the first samples with a picture, the same ones however a step is divided."""
    samples = (data[number] for number in range(len(data)))
    return list(islice((s for s in samples if s["picture"] is not None), START))


def train_stage(
    model: CompressionModel,
    stage: Stage,
    data: Dataset,
    packer: Any,
    output: Path,
    seed: int,
    *,
    precision: str = "bf16",
    checkpointing: bool = False,
    workers: int = 0,
) -> dict[str, Tensor]:
    """Run one stage, or continue it from its last checkpoint in ``output``.

    Parameters
    ----------
    model : CompressionModel
        What is trained; `choose_trainable` has been applied.
    stage : Stage
        How.
    data : Dataset
        Samples in order; each step takes the next ``batch_size``.
    packer : Packer or callable
        Collates samples into the model's arguments.
    output : Path
        Receives checkpoints and ``log.jsonl``.
    seed : int
        Seed of whatever chance there is besides the data.
    precision : {"bf16", "fp32"}
        Arithmetic of the forward and backward passes; weights and AdamW's states are as loaded.
    checkpointing : bool
        Whether activations inside decoder layers are computed again instead of stored.
    workers : int
        Processes that read and collate samples.

    Returns
    -------
    dict of str to Tensor
        What was trained, on the CPU.

    Raises
    ------
    UsageError
        If the batch does not divide among the processes, or one process sees several GPUs.
    """
    model.grounding, model.phase = stage.grounding, stage.phase
    steps = stage.steps or len(data) // stage.batch_size  # type: ignore[arg-type]
    output.mkdir(parents=True, exist_ok=True)
    shared: dict[str, Any] = {
        "output_dir": str(output),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": precision == "bf16",
        "seed": seed,
        "disable_tqdm": not sys.stderr.isatty(),
        "report_to": [],
    }
    # The processes are known once the arguments have joined them.
    joined = TrainingArguments(**shared)
    if joined.n_gpu > 1:
        raise UsageError(
            f"one process sees {joined.n_gpu} GPUs: start it with accelerate launch, or show it "
            "one with CUDA_VISIBLE_DEVICES=0"
        )
    micro, passes = stage.split(joined.world_size)
    arguments = TrainingArguments(
        **shared,
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=passes,
        learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup(steps),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": stage.final_rate},
        max_grad_norm=stage.max_grad_norm,
        logging_steps=stage.log_steps,
        save_steps=stage.save_steps,
        save_total_limit=1,
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        train_sampling_strategy="sequential",  # the source is already in random order
        # A tower has layers behind those that are read.
        ddp_find_unused_parameters=stage.vision_learning_rate > 0,
    )
    if isinstance(packer, Packer) and arguments.world_size > 1:
        packer = replace(packer, placeholder=True)
    if checkpointing:
        model.activation_checkpointing_enable()
    trainer = CompressionTrainer(
        model, arguments, train_dataset=data, data_collator=packer, stage=stage
    )
    trainer.add_callback(LossCurve(output / "log.jsonl", trainer))
    trainer.add_callback(Progress(model))
    trainer.remove_callback(PrinterCallback)  # it writes to stdout, where results go
    checkpoint = last_complete(output)
    if checkpoint is None and model.auxiliary is not None:
        model.start_auxiliary(packer(_pictured(data))["batch"])
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.trained_state()
