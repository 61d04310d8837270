"""Layout (what each position is) and Selection (what becomes of it).

A selection is a gather, optionally with merging: output slot ``k`` of a row is ::

    own[k] * x[index[k]] + sum over extra terms (slot = k) of weight * x[source]

which covers keeping tokens, averaging clusters, pooling and "target plus mean". Integer planes
(positions, kinds) always take the destination's value ``x[index[k]]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property, reduce
from operator import or_

import torch
import torch.nn.functional as F
from torch import Tensor


class Kind(IntEnum):
    """What a position of the sequence holds."""

    PAD = -1
    PREFIX = 0  # text before the last visual or learned token
    VISUAL = 1
    LEARNED = 2
    SUFFIX = 3  # text after the image block, generated tokens included


@dataclass
class Selection:
    """Which positions survive, and what is merged into them.

    Attributes
    ----------
    index : Tensor, long, shape (batch, out)
        Source position of each output slot; -1 for padding.
    own : Tensor or None, shape (batch, out)
        Weight of the slot's own token; None means 1.
    extra : tuple of Tensor or None
        ``(row, slot, source, weight)``, each of shape (terms,): tokens merged into a slot.
    """

    index: Tensor
    own: Tensor | None = None
    extra: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @classmethod
    def from_mask(cls, keep: Tensor, later: Tensor | None = None) -> Selection:
        """Keep the positions where ``keep`` (bool, shape (batch, tokens)) is True, in order.

        Parameters
        ----------
        keep : Tensor, bool, shape (batch, tokens)
            What is kept.
        later : Tensor, optional, shape (batch, tokens), uint8 below 255
            Kept positions are sorted by it first; default all alike.
        """
        counts = keep.sum(-1)
        width = int(counts.max()) if len(counts) else 0
        rank = ~keep if later is None else later.masked_fill(~keep, 255)
        order = rank.argsort(dim=-1, stable=True)[:, :width]
        slots = torch.arange(width, device=keep.device)
        return cls(order.masked_fill(slots >= counts[:, None], -1))

    def gather(self, values: Tensor, fill: int | float | bool = 0) -> Tensor:
        """Take each slot's own value, without merging.

        Parameters
        ----------
        values : Tensor, shape (batch, tokens, ...)
            Anything that runs along the sequence.
        fill : number
            Value of padded slots.
        """
        tail = (1,) * (values.dim() - 2)
        index = self.index.clamp_min(0).reshape(*self.index.shape, *tail)
        taken = values.gather(1, index.expand(*self.index.shape, *values.shape[2:]))
        return taken.masked_fill((self.index < 0).reshape(*self.index.shape, *tail), fill)

    def apply(self, values: Tensor) -> Tensor:
        """Keep and merge real-valued tokens of shape (batch, tokens, width), in fp32 sums."""
        out = self.gather(values)
        if self.own is None and self.extra is None:
            return out
        merged = out.float()
        if self.own is not None:
            merged = merged * self.own[..., None].float()
        if self.extra is not None:
            row, slot, source, weight = self.extra
            flat = merged.flatten(0, 1)
            terms = values[row, source].float() * weight[:, None].float()
            merged = flat.index_add(0, row * out.shape[1] + slot, terms).view_as(merged)
        return merged.to(values.dtype)

    def matrix(self, tokens: int) -> Tensor:
        """Write the selection as dense weights of shape (batch, out, tokens)."""
        eye = torch.eye(tokens, device=self.index.device)
        return self.apply(eye.expand(len(self.index), tokens, tokens))


@dataclass
class Layout:
    """What each position of a batch of sequences is.

    Attributes
    ----------
    kind : Tensor, int8, shape (batch, tokens)
        A `Kind` per position.
    image : Tensor, int16, shape (batch, tokens)
        Number of the picture within the prompt that a visual position belongs to; -1 elsewhere.
    place : Tensor, int32, shape (batch, tokens)
        Raster place of a visual token in its picture, number of a learned token; -1 elsewhere.
    turn : Tensor, int16, shape (batch, tokens)
        Which of several independent questions a text position belongs to, where training packs
        them into one sequence; -1: all of them. Turns do not see each other.
    positions : Tensor, long, shape (planes, batch, tokens)
        Rotary position ids: one plane for 1-D RoPE, three (t, h, w) for M-RoPE.
    """

    kind: Tensor
    image: Tensor
    place: Tensor
    turn: Tensor
    positions: Tensor

    @classmethod
    def build(
        cls,
        kind: Tensor,
        positions: Tensor | None = None,
        *,
        image: Tensor | None = None,
        place: Tensor | None = None,
        turn: Tensor | None = None,
    ) -> Layout:
        """Fill in what is not given: -1 for image, place and turn, one plane of zeros."""

        def of(values: Tensor | None, dtype: torch.dtype) -> Tensor:
            return torch.full_like(kind, -1, dtype=dtype) if values is None else values.to(dtype)

        if positions is None:
            positions = torch.zeros_like(kind, dtype=torch.long)[None]
        return cls(
            kind.to(torch.int8),
            of(image, torch.int16),
            of(place, torch.int32),
            of(turn, torch.int16),
            positions,
        )

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.kind.shape[0]

    @property
    def tokens(self) -> int:
        """Length, padding included."""
        return self.kind.shape[1]

    @property
    def valid(self) -> Tensor:
        """True where there is a token; bool, shape (batch, tokens)."""
        return self.kind >= 0

    def is_kind(self, *kinds: Kind) -> Tensor:
        """Mark the positions that are one of ``kinds``; bool, shape (batch, tokens)."""
        return reduce(or_, (self.kind == kind for kind in kinds))

    @cached_property
    def visual_counts(self) -> list[tuple[int, int]]:
        """Per row: visual tokens, and pictures (at least 1); read from the device only once."""
        visual = self.is_kind(Kind.VISUAL).sum(-1)
        pictures = (self.image.amax(-1) + 1).clamp_min(1)
        return list(zip(visual.tolist(), pictures.tolist(), strict=True))

    def same_turn(self, turn: Tensor) -> Tensor:
        """Mark what may be seen from a turn: itself and what belongs to no turn.

        Parameters
        ----------
        turn : Tensor, int16, shape (batch, queries)
            Turn of each query.

        Returns
        -------
        Tensor
            Bool, shape (batch, queries, tokens).
        """
        own = self.turn[:, None, :]
        return (own < 0) | (own == turn[:, :, None])

    def last_valid(self) -> Tensor:
        """Index of each row's last token; long, shape (batch,)."""
        steps = torch.arange(self.tokens, device=self.kind.device)
        return torch.where(self.valid, steps, -1).amax(-1)

    def next_position(self) -> Tensor:
        """One past the largest position of each row, 0 without any; long, shape (batch,)."""
        if not self.tokens:
            return torch.zeros(self.batch, dtype=torch.long, device=self.kind.device)
        return self.positions.amax(0).masked_fill(~self.valid, -1).amax(-1) + 1

    def moved(self, offset: Tensor) -> Layout:
        """Add ``offset``, long, shape (batch,), to the positions of each row."""
        return replace(self, positions=self.positions + offset[None, :, None])

    def renumbered(self) -> Layout:
        """Count the positions of each row from 0, on every plane."""
        order = (self.valid.long().cumsum(1) - 1).clamp_min(0)
        return replace(self, positions=order.expand_as(self.positions))

    def select(self, selection: Selection) -> Layout:
        """Apply a selection; merged slots take the destination's values."""
        return Layout(
            kind=selection.gather(self.kind, int(Kind.PAD)),
            image=selection.gather(self.image, -1),
            place=selection.gather(self.place, -1),
            turn=selection.gather(self.turn, -1),
            positions=torch.stack([selection.gather(plane) for plane in self.positions]),
        )

    def rows(self, index: Tensor) -> Layout:
        """Take (or repeat) whole sequences."""
        return Layout(
            self.kind[index],
            self.image[index],
            self.place[index],
            self.turn[index],
            self.positions[:, index],
        )

    def front(self, count: int) -> Layout:
        """Take the first ``count`` positions of each row."""
        return Layout(
            self.kind[:, :count],
            self.image[:, :count],
            self.place[:, :count],
            self.turn[:, :count],
            self.positions[..., :count],
        )

    def at(self, index: Tensor) -> Layout:
        """Take positions ``index``, long, shape (batch, chosen), of each row."""
        rows = torch.arange(self.batch, device=index.device)[:, None]
        return Layout(
            self.kind[rows, index],
            self.image[rows, index],
            self.place[rows, index],
            self.turn[rows, index],
            self.positions[:, rows, index],
        )

    @staticmethod
    def cat(parts: Sequence[Layout]) -> Layout:
        """Join layouts of the same batch along the sequence."""
        return Layout(
            torch.cat([part.kind for part in parts], 1),
            torch.cat([part.image for part in parts], 1),
            torch.cat([part.place for part in parts], 1),
            torch.cat([part.turn for part in parts], 1),
            torch.cat([part.positions for part in parts], 2),
        )

    @staticmethod
    def stack(parts: Sequence[Layout]) -> Layout:
        """Put batches under each other, padded on the right to the longest."""
        width = max(part.tokens for part in parts)

        def joined(values: Sequence[Tensor], fill: int) -> Tensor:
            wide = [F.pad(value, (0, width - value.shape[-1]), value=fill) for value in values]
            return torch.cat(wide, -2)

        return Layout(
            joined([part.kind for part in parts], int(Kind.PAD)),
            joined([part.image for part in parts], -1),
            joined([part.place for part in parts], -1),
            joined([part.turn for part in parts], -1),
            joined([part.positions for part in parts], 0),
        )


def top_mask(scores: Tensor, eligible: Tensor, k: Tensor | int) -> Tensor:
    """Mark the ``k`` best eligible positions of each row.

    Scores are rounded to a 2**-20 part of the row's maximum and equal ones are taken in sequence
    order, so that the last bit of a sum, which depends on batch size and kernel, does not decide
    between tokens that are the same.

    Parameters
    ----------
    scores : Tensor, shape (batch, tokens)
        Higher is better.
    eligible : Tensor, bool, shape (batch, tokens)
        Positions that may be taken.
    k : int or Tensor, shape (batch,)
        How many to take; all eligible ones where there are fewer.

    Returns
    -------
    Tensor
        Bool, shape (batch, tokens).
    """
    scores = scores.float().masked_fill(~eligible, 0)
    step = scores.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 2**20
    rounded = torch.round(scores / step).masked_fill(~eligible, float("-inf"))
    order = rounded.argsort(dim=-1, descending=True, stable=True)
    limit = torch.as_tensor(k, device=scores.device).reshape(-1, 1)
    taken = torch.arange(order.shape[-1], device=scores.device) < limit
    kept = torch.zeros_like(order, dtype=torch.bool)
    return kept.scatter(-1, order, taken.expand_as(order)) & eligible
