"""Tuned weights as differences to the backbone's."""

from __future__ import annotations

import pytest
import torch

from etcbench.deltas import DELTA4, DELTA8, GROUP, SCALE, decode, encode


@pytest.mark.parametrize("shape", [(3, 7), (5, 32), (2, 3, 5), (1, 1)])
@pytest.mark.parametrize(("storage", "largest"), [(DELTA8, 127), (DELTA4, 7)])
def test_what_is_a_multiple_of_the_scale_comes_back(
    storage: str, largest: int, shape: tuple[int, ...]
) -> None:
    draw = torch.Generator().manual_seed(0)
    base = {"model.w": torch.randn(shape, generator=draw)}
    steps = torch.randint(-largest, largest + 1, shape, generator=draw)
    steps[..., 0] = largest
    if storage == DELTA4:
        steps.view(-1)[::GROUP] = largest
    moved = {"model.w": base["model.w"] + steps * 2**-6}
    stored = encode(moved, base, storage)
    torch.testing.assert_close(decode(stored, base)["model.w"], moved["model.w"])


def test_a_byte_holds_two_steps() -> None:
    base = {"model.w": torch.zeros(4, GROUP)}
    stored = encode({"model.w": torch.ones(4, GROUP)}, base, DELTA4)
    assert stored["model.w"].dtype == torch.uint8
    assert stored["model.w"].shape == (4, GROUP // 2)
    assert stored["model.w" + SCALE].dtype == torch.bfloat16


@pytest.mark.parametrize("storage", [DELTA8, DELTA4])
def test_what_did_not_move_is_the_backbones(storage: str) -> None:
    base = {"model.w": torch.randn(3, 40), "model.b": torch.randn(3)}
    found = decode(encode(base, base, storage), base)
    assert all(torch.equal(found[name], value) for name, value in base.items())


@pytest.mark.parametrize("storage", [DELTA8, DELTA4])
def test_another_shape_is_left_for_the_caller_to_refuse(storage: str) -> None:
    base = {"model.w": torch.randn(8, 40)}
    stored = encode({"model.w": base["model.w"] + 1}, base, storage)
    other = {"model.w": torch.randn(9, 48)}
    assert torch.equal(decode(stored, other)["model.w"], stored["model.w"])
