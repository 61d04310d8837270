"""``torchrun tests/sharded.py RECIPE OUT``: trainings under FSDP 1 and 2, on CPUs.

accelerate divides models among accelerators only, and trains with DDP on CPUs. Told that these
processes hold accelerators it takes its own way to FSDP, which works with gloo; all else is
etcbench's training as it is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from etcbench.recipes import load_recipe, train
from etcbench.training import trainer


class Sharded(trainer.CompressionTrainer):
    """The trainer, on processes that pass for accelerators."""

    def create_accelerator_and_postprocess(self) -> None:
        """Build the accelerator; `TrainingArguments` have set the state anew before."""
        state = PartialState()
        state.distributed_type, state.device = DistributedType.MULTI_GPU, torch.device("cpu")
        super().create_accelerator_and_postprocess()


if __name__ == "__main__":
    recipe, out = sys.argv[1:]
    trainer.CompressionTrainer = Sharded  # type: ignore[misc]
    for version, divided in (("1", "FULL_SHARD"), ("2", "true")):
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": version,
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": divided,
            "FSDP_USE_ORIG_PARAMS": "true",
        }
        train(load_recipe(recipe), Path(out) / f"fsdp{version}")
