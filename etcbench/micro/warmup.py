"""Stage A: teach the vision tower to see before any language is involved.

Every patch of the layer -2 output names its object, its row and its column; the mean of the patches
names the ground and the distortion, CLS names the classes that are there. Without this stage a
language model of this size learns nothing visual (spec micro-feasibility 6); without the row and
column targets the tower erases where things are. The heads are thrown away.

    python -m etcbench.micro.warmup --output DIR [--steps 1800] [--seed 0]

The same command again continues an interrupted run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import CLIPVisionModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from etcbench.micro.artwork import sprites
from etcbench.micro.model import IMAGE, PATCH, normalise, vision_config
from etcbench.micro.scenes import BACKGROUNDS, DISTORTIONS, Policy, scene_at, through_jpeg

GROUND_WEIGHT = 0.1
AUXILIARY_WEIGHTS = {"row": 0.1, "column": 0.1, "background": 0.05, "distortion": 0.05, "cls": 0.2}
JPEG_SHARE = 0.5
HELD_OUT_SCENES = 256


class PatchScenes(Dataset):
    """Scenes with the targets of every head, freshly drawn and addressable by index."""

    def __init__(self, seed: int, length: int, policy: Policy = "train") -> None:
        self.seed, self.length, self.policy = seed, length, policy

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Pixels [3, H, W], class of every patch, ground, distortion, presence of every class."""
        scene, rng = scene_at(self.seed, index, self.policy)
        picture = scene.render()
        if rng.random() < JPEG_SHARE:
            picture = through_jpeg(picture)
        present = np.zeros(len(sprites()), np.float32)
        present[[sprite.index for sprite in scene.classes]] = 1
        return {
            "pixel_values": normalise(picture),
            "patch_classes": torch.from_numpy(scene.patch_classes(PATCH).reshape(-1)),
            "background": list(BACKGROUNDS).index(scene.background),
            "distortion": DISTORTIONS.index(scene.distortion),
            "present": torch.from_numpy(present),
        }


class PatchClassifier(nn.Module):
    """The vision tower up to its layer -2 output, with one linear head per target."""

    def __init__(self) -> None:
        super().__init__()
        config = vision_config()
        self.grid = IMAGE // PATCH
        # LLaVA reads layer -2, so the last layer would get no gradient.
        config.num_hidden_layers -= 1
        self.vision = CLIPVisionModel(config)
        width, classes = config.hidden_size, len(sprites())
        outputs = {
            "object": classes + 1,
            "row": self.grid,
            "column": self.grid,
            "background": len(BACKGROUNDS),
            "distortion": len(DISTORTIONS),
            "cls": classes,
        }
        self.heads = nn.ModuleDict(
            {n: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, k)) for n, k in outputs.items()}
        )
        self.class_weight: Tensor
        weight = torch.ones(classes + 1)
        weight[0] = GROUND_WEIGHT
        self.register_buffer("class_weight", weight, persistent=False)
        place = torch.arange(self.grid**2)
        self.register_buffer("rows", place // self.grid, persistent=False)
        self.register_buffer("columns", place % self.grid, persistent=False)

    def forward(
        self,
        pixel_values: Tensor,
        patch_classes: Tensor,
        background: Tensor,
        distortion: Tensor,
        present: Tensor,
    ) -> dict[str, Tensor]:
        """Weighted sum of the cross-entropies, and the object logits [B, patches, classes + 1]."""
        hidden = self.vision(pixel_values, output_hidden_states=True).hidden_states[-1]
        patches, mean = hidden[:, 1:], hidden[:, 1:].mean(1)
        logits = self.heads["object"](patches).float()
        losses = {
            "row": self._place_loss("row", patches, self.rows),
            "column": self._place_loss("column", patches, self.columns),
            "background": F.cross_entropy(self.heads["background"](mean).float(), background),
            "distortion": F.cross_entropy(self.heads["distortion"](mean).float(), distortion),
            "cls": F.cross_entropy(
                self.heads["cls"](hidden[:, 0]).float(), present / present.sum(1, keepdim=True)
            ),
        }
        loss = F.cross_entropy(logits.flatten(0, 1), patch_classes.flatten(), self.class_weight)
        for name, value in losses.items():
            loss = loss + AUXILIARY_WEIGHTS[name] * value
        return {"loss": loss, "logits": logits}

    def _place_loss(self, name: str, patches: Tensor, target: Any) -> Tensor:
        logits = self.heads[name](patches).float()
        return F.cross_entropy(logits.flatten(0, 1), target.repeat(len(patches)))


class JsonLines(TrainerCallback):
    """Append every log record of the trainer to one file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Write one record."""
        with self.file.open("a") as stream:
            stream.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def object_accuracy(prediction: Any) -> dict[str, float]:
    """Share of object patches named right, and of ground patches known as ground."""
    guess, gold = prediction.predictions.argmax(-1), prediction.label_ids
    thing = gold > 0
    return {
        "object_accuracy": float((guess == gold)[thing].mean()),
        "ground_accuracy": float((guess == gold)[~thing].mean()),
    }


def train(output_dir: str | Path, steps: int = 1800, seed: int = 0, batch_size: int = 64) -> Path:
    """Train the tower; continue from the last checkpoint in ``output_dir`` if there is one.

    Parameters
    ----------
    output_dir : str or pathlib.Path
        Receives checkpoints, ``log.jsonl`` and the result.
    steps : int
        Optimiser steps.
    seed : int
        Seed of the weights and of the scenes.
    batch_size : int
        Scenes per step.

    Returns
    -------
    pathlib.Path
        ``vision.safetensors``: the tower without its last layer, names as in `CLIPVisionModel`.
    """
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = PatchClassifier()
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=1e-3,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.02,
        warmup_steps=100,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=100,
        label_names=["patch_classes"],
        logging_steps=20,
        save_steps=200,
        save_total_limit=2,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        seed=seed,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=PatchScenes(seed, steps * batch_size),
        eval_dataset=PatchScenes(seed, HELD_OUT_SCENES, "iid"),
        compute_metrics=object_accuracy,
        callbacks=[JsonLines(output / "log.jsonl")],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)))
    result = output / "vision.safetensors"
    save_file({k: v.contiguous() for k, v in model.vision.state_dict().items()}, result)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Warm up the vision tower of micro-llava.")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train(options.output, options.steps, options.seed)
