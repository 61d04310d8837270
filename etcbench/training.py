"""Training of compressors, and of the embedded models, on `transformers.Trainer`.

One forward serves everything: pictures through the tower, packed turns through the same layer loop
as at evaluation, under the method's own mask. Cross-entropy is taken at the answers; a method
that brings a `training_module` (ETC) adds its auxiliary loss.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from etcbench.backbones.base import Backbone, Stream, Visual
from etcbench.compressor import Compressor
from etcbench.decoder import Decoder
from etcbench.packing import PackedBatch, Packer
from etcbench.selection import Kind, Layout


@dataclass(frozen=True)
class Stage:
    """One optimisation run of a recipe.

    Attributes
    ----------
    steps, batch_size, warmup_steps : int
        Optimiser steps, samples per step, steps of linear warm-up.
    learning_rate : float
        Peak rate of the language model, projector and method.
    final_rate : float
        Share of the peak rate at which the cosine schedule ends.
    vision_learning_rate : float
        Peak rate of the vision tower; 0 freezes it.
    tune_model : bool
        Whether the language model and projector are trained (else the method's parameters only).
    mix : dict or None
        Weights of the kinds of turn; None for the data's own.
    auxiliary_learning_rate : float
        Peak rate of training-only modules.
    grounding : float
        Weight of naming, by the model's own word embeddings, what each visual embedding shows;
        needs data that says so. It puts pictures and words into one space (LLaVA's first stage
        does it with captions), without which "is there a ..." is learned word by word.
    save_steps : int
        Steps between checkpoints from which a stopped run continues.
    """

    steps: int
    batch_size: int = 32
    warmup_steps: int = 50
    learning_rate: float = 1e-3
    vision_learning_rate: float = 0.0
    tune_model: bool = True
    mix: dict[str, float] | None = None
    auxiliary_learning_rate: float = 1e-3
    grounding: float = 0.0
    final_rate: float = 0.02
    save_steps: int = 200


class CompressionModel(nn.Module):
    """Backbone and method as one module whose forward gives the loss.

    Parameters
    ----------
    backbone : Backbone
        The model; its own weights are trained as far as they require gradients.
    compressor : Compressor
        The method.
    """

    def __init__(self, backbone: Backbone, compressor: Compressor) -> None:
        super().__init__()
        self.model = backbone.model
        self.compressor = compressor.module or nn.Module()
        self.auxiliary: Any = compressor.training_module(backbone.spec)
        self._parts = (backbone, compressor, Decoder(backbone, compressor))
        self.grounding = 0.0

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Only what is trained: what a checkpoint has to hold."""
        trained = {name for name, value in self.named_parameters() if value.requires_grad}
        trained |= {name for name, _ in self.named_buffers() if name.startswith("auxiliary")}
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if name in trained}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load what `state_dict` saved; what is not trained is not missing."""
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = sorted(set(found.missing_keys) & set(self.state_dict()))
        if strict and (missing or found.unexpected_keys):
            raise RuntimeError(f"missing {missing}, unexpected {found.unexpected_keys}")
        return type(found)(missing, found.unexpected_keys)

    def forward(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Compute the loss of a packed batch.

        Returns
        -------
        dict of str to Tensor
            ``loss``; its parts ``ce`` and, with an auxiliary loss, ``auxiliary`` (weighted) and
            ``unexplained``; ``accuracy`` of the answer tokens under teacher forcing.
        """
        backbone, compressor, decoder = self._parts
        if (own := compressor.objective(self, batch)) is not None:
            return own
        split = self.auxiliary.layer if self.auxiliary is not None else 0
        visual = self._visual(batch)
        inputs = decoder.run(self._embed(batch, visual), None, 0, split, select=False)
        outputs = decoder.run(inputs, None, split, decoder.layers, select=False)
        count = batch.labels.shape[1]
        wanted = batch.labels >= 0
        logits = backbone.logits(outputs.hidden[:, -count:][wanted.to(outputs.hidden.device)])
        labels = batch.labels[wanted].to(logits.device)
        weights = batch.weights[wanted].to(logits.device)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        ce = (losses * weights).sum()
        with torch.no_grad():
            accuracy = ((logits.argmax(-1) == labels).float() * weights).sum()
        result = {"loss": ce, "ce": ce.detach(), "accuracy": accuracy}
        if self.grounding and visual is not None and batch.shown is not None:
            named = backbone.logits(visual.embeds).float().flatten(0, 1)
            naming = F.cross_entropy(named, batch.shown.flatten().to(named.device))
            result |= {"loss": result["loss"] + self.grounding * naming, "naming": naming.detach()}
        if self.auxiliary is not None and batch.pixels is not None:
            shown = len(batch.pixels.grid)
            value, unexplained = self.auxiliary(
                backbone,
                _first(inputs, shown),
                _first(outputs, shown),
                batch.instruction[:shown].to(logits.device),
            )
            result |= {
                "loss": result["loss"] + value,
                "auxiliary": value.detach(),
                "unexplained": unexplained,
            }
        return result

    def _visual(self, batch: PackedBatch) -> Visual | None:
        backbone, compressor, _ = self._parts
        return None if batch.pixels is None else backbone.visual(batch.pixels, compressor)

    def _embed(self, batch: PackedBatch, shown: Visual | None) -> Stream:
        backbone, compressor, _ = self._parts
        visual: list[Visual] = []
        if shown is not None:
            visual = [_with_blind_rows(shown, len(batch.prompts) - len(shown.grid))]
        prefix = backbone.assemble(batch.prompts, visual, compressor.learned_tokens())
        text = backbone.text(batch.text, Kind.SUFFIX)
        turns = batch.turns.to(text.hidden.device)
        start = prefix.next_position[None, :, None]
        positions = start + batch.offsets.to(turns.device)[None]
        layout = Layout.build(
            text.layout.kind.masked_fill(turns < 0, int(Kind.PAD)),
            positions.expand(backbone.planes, -1, -1),
            turn=turns,
        )
        return Stream.cat([prefix, Stream(text.hidden, layout)])


def _first(stream: Stream, rows: int) -> Stream:
    return stream.rows(torch.arange(rows, device=stream.hidden.device))


def _with_blind_rows(visual: Visual, rows: int) -> Visual:
    """Append rows that have no picture."""
    if not rows:
        return visual
    return Visual(
        F.pad(visual.embeds, (0, 0, 0, 0, 0, rows)),
        F.pad(visual.place, (0, 0, 0, rows), value=-1),
        F.pad(visual.grid, (0, 0, 0, rows)),
        tuple(F.pad(features, (0, 0, 0, 0, 0, rows)) for features in visual.deepstack),
    )


class Indexed(Dataset):
    """The first ``length`` samples of an index-addressable stream, from ``start`` on."""

    def __init__(self, stream: Any, start: int, length: int) -> None:
        self.stream, self.start, self.length = stream, start, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.stream.sample(self.start + index)
        return {key: sample[key] for key in ("picture", "turns", "patch_names") if key in sample}


class LossCurve(TrainerCallback):
    """Append every log record, with the wall time so far, to one file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.begin = time.monotonic()
        lines = file.read_text().splitlines() if file.exists() else []
        self.before = max((json.loads(line)["seconds"] for line in lines), default=0.0)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Write one record; ``seconds`` counts training time, stops in between left out."""
        seconds = round(self.before + time.monotonic() - self.begin, 1)
        record = {"step": state.global_step, "seconds": seconds, **(logs or {})}
        with self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")


class CompressionTrainer(Trainer):
    """Trainer that reports the parts of the loss, keeps the data's order and trains by group."""

    def __init__(self, *args: Any, stage: Stage, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stage = stage
        self.parts: dict[str, list[Tensor]] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Run the model and keep the parts of the loss for the log."""
        result = model(**inputs)
        for name, value in result.items():
            if name != "loss":
                self.parts.setdefault(name, []).append(value.detach())
        return (result["loss"], result) if return_outputs else result["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each part since the last record."""
        if "loss" in logs:
            for name, values in self.parts.items():
                logs[name] = round(float(torch.stack(values).mean()), 6)
            if logs.get("ce"):
                logs["auxiliary_over_ce"] = round(logs.get("auxiliary", 0.0) / logs["ce"], 4)
            self.parts = {}
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with one learning rate per part of the model."""
        assert self.model is not None
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                rate = self.stage.learning_rate
                if _in_tower(name):
                    rate = self.stage.vision_learning_rate
                elif name.startswith("auxiliary"):
                    rate = self.stage.auxiliary_learning_rate
                groups.setdefault(rate, []).append(parameter)
        parameters = [{"params": part, "lr": rate} for rate, part in groups.items()]
        betas = (self.args.adam_beta1, self.args.adam_beta2)
        self.optimizer = torch.optim.AdamW(
            parameters, betas=betas, weight_decay=self.args.weight_decay
        )
        return self.optimizer


def _in_tower(name: str) -> bool:
    """Whether a parameter belongs to a vision tower (CLIP's or Qwen's)."""
    return "vision_tower." in name or ".visual." in name


def choose_trainable(model: CompressionModel, stage: Stage, tokens_too: bool) -> None:
    """Freeze what a stage does not train.

    Parameters
    ----------
    tokens_too : bool
        Whether the token embeddings (and a tied head) are trained; a compressor leaves them be,
        so that its checkpoint stays small.
    """
    for name, parameter in model.named_parameters():
        if _in_tower(name):
            wanted = stage.vision_learning_rate > 0
        elif name.startswith("model."):
            is_token = "embed_tokens" in name or "lm_head" in name
            wanted = stage.tune_model and (tokens_too or not is_token)
        else:
            wanted = True
        parameter.requires_grad_(wanted)


def train_stage(
    model: CompressionModel, stage: Stage, data: Dataset, packer: Packer, output: Path, seed: int
) -> None:
    """Run one stage, or continue it from its last checkpoint in ``output``."""
    model.grounding = stage.grounding
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        warmup_steps=stage.warmup_steps,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": stage.final_rate},
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=20,
        save_steps=stage.save_steps,
        save_total_limit=1,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
        seed=seed,
        train_sampling_strategy="sequential",  # the stream is already in random order
    )
    trainer = CompressionTrainer(
        model, arguments, train_dataset=data, data_collator=packer, stage=stage,
        callbacks=[LossCurve(output / "log.jsonl")],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # it writes to stdout, where results go
    output.mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)))
