"""The embedded models before training: build one by its name, save one when it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from etcbench.errors import unknown_name

NAMES = ("micro-llava", "micro-qwen3vl")


def build(name: str, seed: int, warmup_steps: int, warmup_output: Path) -> tuple[Any, Any]:
    """Build an untrained embedded model and its processor.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    seed : int
        Seed of the weights.
    warmup_steps : int
        Steps of micro-llava's vision warm-up, which is run or continued here; micro-qwen3vl has
        its warm-up among the stages of its recipe.
    warmup_output : Path
        Output folder of the warm-up.

    Raises
    ------
    UsageError
        If there is no such model.
    """
    if name == "micro-llava":
        from etcbench.micro import model as llava
        from etcbench.micro import warmup

        vision = warmup.train(warmup_output, steps=warmup_steps, seed=seed)
        return llava.build_micro_llava(seed, vision), llava.build_processor()
    if name == "micro-qwen3vl":
        from etcbench.micro import qwen3_vl

        return qwen3_vl.build_micro_qwen3vl(seed), qwen3_vl.build_processor()
    raise unknown_name("embedded model", name, NAMES)


def save(model: Any, processor: Any, folder: str | Path) -> None:
    """Save a model and its processor; weights in half precision, to be loaded as float32.

    ``from_pretrained`` gives the rounded values as float32, since the config says so.
    """
    half = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)
    processor.save_pretrained(folder)
