"""Tuned weights stored as 8-bit differences to the backbone's own, at half the size of 16 bits.

Training moves a weight by little, so a difference needs fewer bits than the weight: with a scale
for each row its rounding error is about 1/254 of the largest step that training took in that row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

HALF, DELTA8 = "half", "delta8"  # how a checkpoint keeps what a training tuned
TUNED = "model."
SCALE = ".delta_scale"
_LARGEST = 127


def encode(weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the tuned matrices of a checkpoint by their differences.

    Parameters
    ----------
    weights : mapping of str to Tensor
        ``compressor.*`` and ``model.*``.
    base : mapping of str to Tensor
        The backbone's own weights, under the same names.

    Returns
    -------
    dict of str to Tensor
        Each tuned matrix as int8 of the same shape, beside ``NAME.delta_scale`` (one entry per
        row); everything else as it was.
    """
    stored: dict[str, Tensor] = {}
    for name, value in weights.items():
        if not (name.startswith(TUNED) and value.ndim > 1):
            stored[name] = value
            continue
        change = value.detach().cpu().float() - base[name].detach().cpu().float()
        scale = change.abs().amax(-1, keepdim=True) / _LARGEST
        # A row that did not move has no scale to divide by. bfloat16 has the range of a difference
        # of any size, and the steps are those of the scale as it is stored.
        scale = scale.to(torch.bfloat16)
        steps = (change / scale.float().masked_fill(scale == 0, 1.0)).round()
        stored[name] = steps.clamp(-_LARGEST, _LARGEST).to(torch.int8)
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
        scale = stored.get(name + SCALE)
        if scale is None or name not in base or base[name].shape != value.shape:
            weights[name] = value
        else:
            weights[name] = base[name].detach().cpu().float() + value.float() * scale.float()
    return weights
