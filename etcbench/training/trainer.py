"""Stages on `transformers.Trainer`: schedule, logs, and continuing where a run was stopped."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from etcbench.packing import Packer
from etcbench.training.model import CompressionModel
from etcbench.training.stage import Stage, in_tower


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
                if in_tower(name):
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
