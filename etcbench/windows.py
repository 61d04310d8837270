"""Merging within windows of the picture: which tokens are together, and who merges into whom.

Spec selective 6.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

SIDES = (4, 2, 1)
MOST_STAGES = 6


@dataclass(frozen=True)
class Windows:
    """Windows and ratios of every stage.

    Attributes
    ----------
    grid : tuple of int or None
        Raster (rows, columns) whose places decide over the windows; None: the remaining tokens,
        laid out as the nearest square.
    sides : tuple of int
        Windows per side, stage by stage; empty: 4, 2, 1, 1, ..., or fewer on small pictures.
    ratios : tuple of float
        Share of a window's tokens that disappears, stage by stage; empty: one half.
    """

    grid: tuple[int, int] | None = None
    sides: tuple[int, ...] = ()
    ratios: tuple[float, ...] = ()

    def side(self, stage: int, tokens: int) -> int:
        """Windows per side for a picture with so many tokens left; 0 to skip the stage.

        A stage needs 8 tokens per window (spec selective 6.2 item 7).
        """
        sides = self.sides[stage : stage + 1] or SIDES[min(stage, 2) :]
        return next((side for side in sides if tokens >= 8 * side * side), 0)

    def ratio(self, stage: int) -> float:
        """Share of a window's tokens that disappears."""
        return self.ratios[stage] if self.ratios else 0.5

    def match(self, stage: int, side: int, tokens: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Match tokens of one picture per row for merging.

        Parameters
        ----------
        stage, side : int
            Number of the stage, windows per side.
        tokens : Tensor, shape (batch, tokens, width)
            Hidden states.
        place : Tensor, long, shape (batch, tokens)
            Raster places.

        Returns
        -------
        tuple of Tensor
            See `bipartite`.
        """
        if self.grid is None:
            window = sequence_windows(place.shape[1], side).to(place.device).expand_as(place)
        else:
            window = windows_of(*self.grid, side).to(place.device)[place]
        return bipartite(tokens, window, self.ratio(stage))


@lru_cache(maxsize=1024)
def chain(windows: Windows, total: int, stages: int | None) -> tuple[int, ...]:
    """Count a picture's tokens at the beginning and after each stage.

    Parameters
    ----------
    windows : Windows
        How they merge.
    total : int
        Tokens at the beginning.
    stages : int or None
        How many stages, skipped ones included; None: as long as tokens merge.
    """
    place, found = torch.arange(total)[None], [total]
    for stage in range(MOST_STAGES if stages is None else stages):
        if side := windows.side(stage, place.shape[1]):
            # What is similar decides who merges, not how many.
            gone, _ = windows.match(stage, side, torch.zeros(*place.shape, 1), place)
            place = place[~gone][None]
        elif stages is None:
            break
        found.append(place.shape[1])
    return tuple(found)


def windows_of(rows: int, columns: int, per_side: int) -> Tensor:
    """Assign each place of a raster to a window, shape (rows * columns,).

    Each side is cut into ``per_side`` parts; the first ``side % per_side`` are one longer.
    """

    def part(side: int) -> Tensor:
        sizes = torch.full((per_side,), side // per_side)
        sizes[: side % per_side] += 1
        return torch.arange(per_side).repeat_interleave(sizes)

    return (part(rows)[:, None] * per_side + part(columns)).flatten()


def sequence_windows(tokens: int, per_side: int) -> Tensor:
    """Assign each token of a sequence, laid out as the nearest square raster, to a window.

    A number of tokens that is no square leaves the raster's end empty (spec selective 6.2 item 1).
    """
    side = isqrt(tokens)
    side += side * side < tokens
    return windows_of(side, side, per_side)[:tokens]


def bipartite(tokens: Tensor, window: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Match tokens for merging within windows (spec selective 6.2 items 2-4).

    The even tokens of a window are sources, the odd ones destinations. The ``int(ratio * size)``
    sources most similar (cosine) to any destination merge into it.

    Parameters
    ----------
    tokens : Tensor, shape (batch, tokens, width)
        Hidden states.
    window : Tensor, long, shape (batch, tokens)
        Number of each token's window.
    ratio : float
        Share of a window's tokens that disappears, at most one half.

    Returns
    -------
    tuple of Tensor
        Which tokens disappear, bool, and each one's destination, long; shape (batch, tokens).
    """
    member = F.one_hot(window)
    size = member.sum(1)
    is_source = _rank(member, window) % 2 == 0
    unit = F.normalize(tokens.float(), dim=-1)
    # Rounded, so that equal similarities do not depend on the last bit of a sum.
    similarity = torch.round(unit @ unit.transpose(-1, -2) * 2**20)
    allowed = (window[:, :, None] == window[:, None, :]) & ~is_source[:, None, :]
    best, target = similarity.masked_fill(~allowed, float("-inf")).max(-1)
    order = best.masked_fill(~is_source, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    sorted_window = window.gather(1, order)
    place = torch.empty_like(order).scatter(
        1, order, _rank(F.one_hot(sorted_window), sorted_window)
    )
    count = torch.minimum((ratio * size.double()).long(), size // 2).gather(1, window)
    return is_source & (place < count), target


def _rank(member: Tensor, window: Tensor) -> Tensor:
    """Place of each token within its window, in sequence order."""
    return member.cumsum(1).gather(2, window[..., None])[..., 0] - 1
