"""Methods that make visual tokens of their own: QueCC, LLaMA-VID, MQT-LLaVA (spec abstractive 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import picture, tiny_llava, tiny_qwen3_vl
from torch import Tensor

from etcbench import registry
from etcbench.backbones import Backbone
from etcbench.backbones.stream import Visual
from etcbench.compressor import Budget, Compressor
from etcbench.packing import Packer
from etcbench.selection import Kind
from etcbench.training import CompressionModel

BACKBONES: dict[str, Any] = {"llava": tiny_llava, "qwen3_vl": tiny_qwen3_vl}
SMALL = {"queries": 3, "width": 24, "depth": 3, "heads": 2}
# name, budget, options
METHODS: list[tuple[str, int, dict[str, Any]]] = [
    ("quecc", 4, {}),
    ("llama-vid", 2, SMALL),
    ("llama-vid", 5, SMALL),
    ("mqt-llava", 5, {}),
]


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return BACKBONES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=METHODS, ids=lambda case: f"{case[0]}-{case[1]}")
def method(request: pytest.FixtureRequest, backbone: Backbone) -> Compressor:
    return build(backbone, *request.param)


def build(backbone: Backbone, name: str, tokens: int | None, options: Any = None) -> Compressor:
    torch.manual_seed(1)
    budget = None if tokens is None else Budget(tokens)
    kind = registry.load("baselines", name)
    made: Compressor = kind.from_budget(budget, backbone.spec, **(options or {}))
    return made


def tokens_of(
    backbone: Backbone, method: Compressor, questions: list[str], shape: tuple[int, int] = (24, 24)
) -> Visual:
    """Visual tokens of one picture for several questions."""
    pixels = backbone.preprocess([picture(0, shape)], ["x"])
    with torch.inference_mode():
        return backbone.visual(pixels, method, [(0, question) for question in questions])


def sample(index: int, turns: int) -> dict[str, Any]:
    rng = np.random.default_rng(index)
    asked = [(f"what {'is ' * k}it?", f"a{'b' * int(rng.integers(4))}") for k in range(turns)]
    shape = [(24, 24), (16, 28), (30, 20)][index % 3]
    shown = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    return {"picture": None if index % 5 == 4 else shown, "turns": asked}


def test_packed_turns_give_the_loss_of_each_turn_alone(
    backbone: Backbone, method: Compressor
) -> None:
    """Each turn sees the tokens made for it, at the positions that they have alone."""
    model = CompressionModel(backbone, method)
    packer = Packer(backbone, method.prompt_layout)
    samples = [sample(index, 1 + index % 3) for index in range(5)]
    with torch.no_grad():
        packed = model(**packer(samples))["ce"]
        single = [
            model(**packer([{"picture": s["picture"], "turns": [turn]}]))["ce"]
            for s in samples
            for turn in s["turns"]
        ]
    assert torch.allclose(packed, torch.stack(single).mean(), atol=1e-5)
