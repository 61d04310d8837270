"""Packed training batches of tiny pictures, and methods to train on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tiny import tiny_llava, tiny_qwen3_vl

from etcbench import registry
from etcbench.backbones import Backbone
from etcbench.compressor import Budget
from etcbench.packing import PackedBatch, Packer
from etcbench.training import CompressionModel

BACKBONES: dict[str, Callable[..., Backbone]] = {"llava": tiny_llava, "qwen3_vl": tiny_qwen3_vl}
SIZES = [(24, 24), (20, 32), (28, 16)]  # rows, columns in pixels; LLaVA resizes them all
TURNS = [
    [("what is it?", "abc"), ("why?", "b")],
    [("how many are there?", "de"), ("a or b?", "cc"), ("x", "yes")],
    [("colour?", "f")],
]


def samples(pictures: int = 3, blind: bool = True) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number in range(pictures):
        rng = np.random.default_rng(number)
        shown = rng.integers(0, 256, (*SIZES[number], 3), dtype=np.uint8)
        found.append({"picture": shown, "turns": TURNS[number]})
    return [*found, {"picture": None, "turns": [("only words", "g")]}] if blind else found


def build(
    backbone: Backbone, name: str = "etc", tokens: int = 2, **options: Any
) -> CompressionModel:
    """Untrained method; small decoders."""
    torch.manual_seed(0)
    defaults = {"lambda_vid": 1e-3, "canonical_grid": 5, "decoder_width": 16}
    chosen = {**defaults, **options} if name == "etc" else options
    method = registry.load("baselines", name).from_budget(Budget(tokens), backbone.spec, **chosen)
    return CompressionModel(backbone, method)


def pack(model: CompressionModel, data: list[dict[str, Any]]) -> PackedBatch:
    backbone, method = model._parts[:2]
    return Packer(backbone, method.prompt_layout)(data)["batch"]
