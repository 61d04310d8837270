"""What flows through a backbone: pictures, prompts, visual tokens, sequences.

No family is named here; what a family does with these is in its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from etcbench.selection import Layout, Selection
from etcbench.states import Resampled


@dataclass
class Pixels:
    """Preprocessed pictures, ready for the vision tower.

    Attributes
    ----------
    tensors : dict of str to Tensor
        Inputs of the tower, first dimension = pictures (or patches, for dynamic resolution).
    grid : Tensor, long, shape (pictures, 2)
        Raster (rows, columns) of the visual tokens of each picture.
    keys : list of str
        Identity of each picture.
    """

    tensors: dict[str, Tensor]
    grid: Tensor
    keys: list[str]


@dataclass(frozen=True)
class Prompt:
    """Token ids of one prompt, split where pictures and learned tokens go.

    The sequence is ``chunks[0] picture_0 chunks[1] picture_1 ... bridge learned after``; a prompt
    without a picture has no chunks.
    """

    chunks: tuple[tuple[int, ...], ...]
    bridge: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def split(cls, ids: Sequence[int], image_token: int, pictures: int) -> Prompt:
        """Cut a tokenized prompt at its image tokens; a prompt without pictures is all text."""
        slots = [place for place, token in enumerate(ids) if token == image_token][:pictures]
        starts = [0, *(slot + 1 for slot in slots)]
        chunks = tuple(tuple(ids[a:b]) for a, b in zip(starts, slots, strict=False))
        return cls(chunks, (), tuple(ids[starts[-1] :]))


@dataclass
class Visual:
    """Visual tokens of a batch of pictures as the language model will see them.

    Attributes
    ----------
    embeds : Tensor, shape (pictures, tokens, hidden)
        Embeddings, padded to the longest picture.
    place : Tensor, long, shape (pictures, tokens)
        Raster place of each token; one past the raster for a CLS token, -1 for padding.
    grid : Tensor, long, shape (pictures, 2)
        Raster of the uncompressed picture.
    deepstack : tuple of Tensor, each of shape (pictures, tokens, hidden)
        What the same tokens add to the outputs of the first decoder layers; empty for families
        without such features.
    lead : int or None
        For tokens that a method has made: how many of them stand in front of its own raster,
        ``grid``; None for the picture's tokens.
    turn : Tensor or None, long, shape (pictures, tokens)
        Which packed question each token is for; None: all of them.
    """

    embeds: Tensor
    place: Tensor
    grid: Tensor
    deepstack: tuple[Tensor, ...] = ()
    lead: int | None = None
    turn: Tensor | None = None

    @classmethod
    def of(cls, resampled: Resampled, dtype: torch.dtype) -> Visual:
        """Take the tokens that a method has made, and number them."""
        embeds, lead, grid = resampled.embeds, resampled.lead, resampled.grid
        if grid is None:
            lead, grid = embeds.shape[1], torch.zeros(len(embeds), 2, dtype=torch.long)
        grid = grid.to(embeds.device)
        places = torch.arange(embeds.shape[1], device=embeds.device)
        place = torch.where(places < lead + grid.prod(-1, keepdim=True), places, -1)
        deepstack = tuple(features.to(dtype) for features in resampled.deepstack)
        return cls(embeds.to(dtype), place, grid, deepstack, lead)

    def steps(self, planes: int) -> Tensor:
        """Positions of the tokens from where the picture begins, (planes, pictures, tokens).

        Raster tokens have t = 0, h = row, w = column; each token of a lead moves h and w on by
        one, as learned tokens do (spec abstractive 1.4).
        """
        lead = self.lead or 0
        place = (self.place - lead).clamp_min(0)
        ahead = self.place.clamp(0, lead)  # tokens of the lead that are passed
        columns = self.grid[:, 1:].clamp_min(1)
        row, column = ahead + place // columns, ahead + place % columns
        return torch.stack([torch.zeros_like(row), row, column])[:planes]

    @property
    def extent(self) -> Tensor:
        """Positions that each picture takes up where its tokens have places; (pictures,)."""
        return (self.lead or 0) + self.grid.amax(-1)

    def rows(self, index: Tensor) -> Visual:
        """Take (or repeat) whole pictures."""
        taken = self._each(lambda values: values[index], lambda values, _: values[index])
        return replace(taken, grid=self.grid[index])

    @staticmethod
    def stack(parts: Sequence[Visual]) -> Visual:
        """Put batches under each other, padded to the longest."""
        width = max(part.place.shape[1] for part in parts)

        def real(values: Tensor) -> Tensor:
            return F.pad(values, (0, 0, 0, width - values.shape[1]))

        def counted(values: Tensor, fill: int) -> Tensor:
            return F.pad(values, (0, width - values.shape[1]), value=fill)

        wide = [part._each(real, counted) for part in parts]
        return replace(
            wide[0],
            embeds=torch.cat([part.embeds for part in wide]),
            place=torch.cat([part.place for part in wide]),
            grid=torch.cat([part.grid for part in wide]),
            deepstack=tuple(
                torch.cat(layer) for layer in zip(*(p.deepstack for p in wide), strict=True)
            ),
        )

    def select(self, selection: Selection) -> Visual:
        """Apply a selection to embeddings, places and DeepStack features alike."""
        return self._each(selection.apply, selection.gather)

    def padded(self, rows: int) -> Visual:
        """Append rows that have no picture."""

        def longer(values: Tensor, fill: int = 0) -> Tensor:
            return torch.cat([values, values.new_full((rows, *values.shape[1:]), fill)])

        return replace(self._each(longer, longer), grid=longer(self.grid)) if rows else self

    def packed(self, counts: Sequence[int]) -> Visual:
        """Put the sets of tokens for several questions on one picture into one row.

        Parameters
        ----------
        counts : sequence of int
            Sets of each row; they follow each other in this batch.
        """
        slots = torch.arange(max(counts), device=self.place.device)
        size = torch.tensor(counts, device=self.place.device)[:, None]
        index = torch.where(slots < size, size.cumsum(0) - size + slots, -1)

        def rows(values: Tensor, fill: int = 0) -> Tensor:
            absent = (index < 0).reshape(*index.shape, *(1,) * (values.dim() - 1))
            return values[index.clamp_min(0)].masked_fill(absent, fill).flatten(1, 2)

        several = self._each(rows, rows)
        turn = slots[:, None].expand(-1, self.place.shape[1]).flatten()
        return replace(several, grid=self.grid[index[:, 0]], turn=turn.expand_as(several.place))

    def _each(
        self, real: Callable[[Tensor], Tensor], counted: Callable[[Tensor, int], Tensor]
    ) -> Visual:
        """Apply ``real`` to all features of the tokens and ``counted`` to what numbers them."""
        return replace(
            self,
            embeds=real(self.embeds),
            place=counted(self.place, -1),
            deepstack=tuple(real(features) for features in self.deepstack),
            turn=None if self.turn is None else counted(self.turn, -1),
        )


@dataclass
class Stream:
    """A batch of sequences on its way through the decoder.

    Attributes
    ----------
    hidden : Tensor, shape (batch, tokens, hidden)
        Hidden states at the input of the next layer.
    layout : Layout
        What each position is.
    deepstack : tuple of Tensor, each of shape (batch, tokens, hidden)
        What is still to be added to the outputs of the next layers, one tensor per layer; zero at
        everything but visual tokens.
    end : Tensor or None, long, shape (batch,)
        First position behind an assembled prefix, which a picture may take up although its last
        tokens are gone; None where the largest position says it.
    """

    hidden: Tensor
    layout: Layout
    deepstack: tuple[Tensor, ...] = ()
    end: Tensor | None = None

    @property
    def next_position(self) -> Tensor:
        """First free position of each row; long, shape (batch,)."""
        return self.layout.next_position() if self.end is None else self.end

    def select(self, selection: Selection) -> Stream:
        """Apply a selection to states, layout and DeepStack features alike."""
        return Stream(
            selection.apply(self.hidden),
            self.layout.select(selection),
            tuple(selection.apply(features) for features in self.deepstack),
            self.end,
        )

    def rows(self, index: Tensor) -> Stream:
        """Take (or repeat) whole sequences."""
        return Stream(
            self.hidden[index],
            self.layout.rows(index),
            tuple(features[index] for features in self.deepstack),
            None if self.end is None else self.end[index],
        )

    def after_layer(self, hidden: Tensor) -> Stream:
        """Continue with a layer's output, adding the features that are due behind that layer."""
        if not self.deepstack:
            return replace(self, hidden=hidden)
        return replace(self, hidden=hidden + self.deepstack[0], deepstack=self.deepstack[1:])

    @staticmethod
    def cat(parts: Sequence[Stream]) -> Stream:
        """Join streams of the same batch along the sequence."""
        depth = max(len(part.deepstack) for part in parts)
        features = [part.deepstack or (torch.zeros_like(part.hidden),) * depth for part in parts]
        return Stream(
            torch.cat([part.hidden for part in parts], 1),
            Layout.cat([part.layout for part in parts]),
            tuple(torch.cat(layer, 1) for layer in zip(*features, strict=True)),
        )

    @staticmethod
    def stack(parts: Sequence[Stream]) -> Stream:
        """Put batches under each other, padded on the right to the longest."""
        width = max(part.layout.tokens for part in parts)

        def joined(values: Sequence[Tensor]) -> Tensor:
            return torch.cat([F.pad(value, (0, 0, 0, width - value.shape[1])) for value in values])

        return Stream(
            joined([part.hidden for part in parts]),
            Layout.stack([part.layout for part in parts]),
            tuple(joined(layer) for layer in zip(*(part.deepstack for part in parts), strict=True)),
            torch.cat([part.next_position for part in parts]),
        )
