"""What a decoder remembers of a batch of sequences: keys, values, and what each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etcbench.backbones.stream import Stream
from etcbench.compressor import Compressor
from etcbench.growing import ROOM, GrowingCache
from etcbench.selection import Layout, Selection


@dataclass
class KVState:
    """Keys and values of every layer, and what each of their positions is.

    Layers hold different tokens once a method has dropped some: ``layouts[l]`` describes layer
    ``l``. ``entered[l]`` counts the visual tokens at that layer's input, shape (batch,), which is
    what compute and memory follow (spec selective 1.3). ``lag[l]``, shape (batch,), says by how
    much positions of layer ``l`` are behind those of layer 0 where a method has renumbered them.
    ``marks`` are the method's notes on each position of the sequence in prefill. ``branch`` is the
    state of the method's branch, if it has one.
    """

    cache: GrowingCache
    layouts: list[Layout | None]
    entered: list[Tensor | None]
    lag: list[Tensor | None]
    next_position: Tensor
    marks: Tensor | None = None
    branch: KVState | None = None

    @classmethod
    def empty(cls, layers: int, start: Tensor) -> KVState:
        """Start without any tokens; ``start`` is each row's first free position."""
        return cls(GrowingCache(), [None] * layers, [None] * layers, [None] * layers, start)

    @property
    def entries(self) -> list[Any]:
        """What each layer has cached: ``keys`` and ``values``, (batch, heads, tokens, size)."""
        return list(self.cache.layers)

    def rows(self, index: Tensor, room: int = ROOM) -> KVState:
        """Take (or repeat) sequences; the copy shares no memory with the original.

        There are ``room`` free places behind its tokens: so many can be added without a copy.
        """
        layouts: dict[int, Layout] = {}
        lags: dict[int, Tensor] = {}
        for layout in self.layouts:
            if layout is not None and id(layout) not in layouts:
                layouts[id(layout)] = layout.rows(index)
        for lag in self.lag:
            if lag is not None and id(lag) not in lags:
                lags[id(lag)] = lag[index]
        return KVState(
            self.cache.rows(index, room),
            [None if layout is None else layouts[id(layout)] for layout in self.layouts],
            [None if count is None else count[index] for count in self.entered],
            [None if lag is None else lags[id(lag)] for lag in self.lag],
            self.next_position[index],
            branch=self.branch and self.branch.rows(index, room),
        )

    @staticmethod
    def stack(parts: Sequence[KVState]) -> KVState:
        """Put batches under each other, padded on the right to the longest."""
        layouts: dict[tuple[int, ...], Layout] = {}
        tensors: dict[tuple[int, ...], Tensor] = {}

        def layout(layer: int) -> Layout | None:
            several = [found for part in parts if (found := part.layouts[layer]) is not None]
            key = tuple(map(id, several))
            if several and key not in layouts:
                layouts[key] = Layout.stack(several)
            return layouts.get(key)

        def joined(rows: Sequence[Tensor | None]) -> Tensor | None:
            key = tuple(map(id, rows))
            if key not in tensors and any(row is not None for row in rows):
                zeros = (torch.zeros_like(part.next_position) for part in parts)
                filled = [z if r is None else r for r, z in zip(rows, zeros, strict=True)]
                tensors[key] = torch.cat(filled)
            return tensors.get(key)

        layers = range(len(parts[0].layouts))
        branches = [part.branch for part in parts if part.branch is not None]
        return KVState(
            GrowingCache.stack([part.cache for part in parts]),
            [layout(layer) for layer in layers],
            [joined([part.entered[layer] for part in parts]) for layer in layers],
            [joined([part.lag[layer] for part in parts]) for layer in layers],
            torch.cat([part.next_position for part in parts]),
            branch=KVState.stack(branches) if branches else None,
        )

    def keep(self, layer: int, selection: Selection) -> None:
        """Drop entries of one layer's cache."""
        entry = self.entries[layer]
        entry.keys = selection.gather(entry.keys.transpose(1, 2)).transpose(1, 2)
        entry.values = selection.gather(entry.values.transpose(1, 2)).transpose(1, 2)

    def settle(self, kept: Tensor, stop: int | None = None) -> None:
        """Decide which of the last entries stay.

        Parameters
        ----------
        kept : Tensor, bool, shape (batch, last)
            For the ``last`` entries of each layer.
        stop : int, optional
            Only layers in front of this one; default all.
        """
        last, counts = kept.shape[1], kept.sum(-1)
        longest = int(counts.max()) if last else 0
        steps = torch.arange(last, device=kept.device)
        leading = bool((kept == (steps < longest)).all())
        if leading and longest == last:
            return
        if not leading and not bool((counts == longest).all()):
            self._settle_unevenly(kept, stop)
            return
        # What stays moves to the front of the last entries; all before them are left alone.
        path = Selection.from_mask(kept).index
        settled: dict[int, tuple[Layout, Layout]] = {}
        for number, layout in enumerate(self.layouts[:stop]):
            assert layout is not None
            front = layout.tokens - last
            if id(layout) not in settled:
                own = layout.front(front + longest)
                if not leading:
                    own = Layout.cat([layout.front(front), layout.at(path + front)])
                settled[id(layout)] = (layout, own)
            self.layouts[number] = settled[id(layout)][1]
            entry = self.entries[number]
            for held in () if leading else (entry.keys, entry.values):
                places = path[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
                held[:, :, front : front + longest] = held[:, :, front:].gather(2, places)
            end = front + longest
            entry.keys, entry.values = entry.keys[:, :, :end], entry.values[:, :, :end]

    def _settle_unevenly(self, kept: Tensor, stop: int | None) -> None:
        """Settle rows that keep different numbers of entries, without gaps between them."""
        settled: dict[int, tuple[Layout, Selection, Layout]] = {}
        for number, layout in enumerate(self.layouts[:stop]):
            assert layout is not None
            if id(layout) not in settled:
                front = layout.valid[:, : layout.tokens - kept.shape[1]]
                selection = Selection.from_mask(torch.cat([front, kept], 1))
                settled[id(layout)] = (layout, selection, layout.select(selection))
            _, selection, self.layouts[number] = settled[id(layout)]
            self.keep(number, selection)

    def evict(self, compressor: Compressor) -> None:
        """Let the method evict entries of every layer."""
        chosen: dict[int, tuple[Selection | None, Layout]] = {}
        for number, layout in enumerate(self.layouts):
            if layout is None:
                continue
            if id(layout) not in chosen:
                selection = compressor.evict(layout)
                kept = layout if selection is None else layout.select(selection)
                chosen[id(layout)] = (selection, kept)
            selection, self.layouts[number] = chosen[id(layout)]
            if selection is not None:
                self.keep(number, selection)

    def bytes(self) -> list[int]:
        """Bytes of the cached tensors, layer by layer."""
        return [
            0 if layer.keys is None else layer.keys.nbytes + layer.values.nbytes
            for layer in self.entries
        ]


@dataclass
class Shared:
    """What is left of an image prefix after the layers that do not depend on the question.

    Attributes
    ----------
    kv : KVState
        Cache of those layers.
    embeds : Stream or None
        Input of layer 0.
    inputs, outputs : Stream or None
        Input and output of the last shared layer; needed when layers follow that depend on the
        question.
    branch : Stream or None
        Input of the last layer of the method's branch.
    """

    kv: KVState
    embeds: Stream | None = None
    inputs: Stream | None = None
    outputs: Stream | None = None
    branch: Stream | None = None

    def rows(self, index: Tensor, room: int = ROOM) -> Shared:
        """Fan out to questions, with ``room`` free places behind each row's tokens."""
        return Shared(
            self.kv.rows(index, room),
            self.embeds and self.embeds.rows(index),
            self.inputs and self.inputs.rows(index),
            self.outputs and self.outputs.rows(index),
            self.branch and self.branch.rows(index),
        )

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.kv.next_position.device

    @property
    def rows_held(self) -> int:
        """Number of sequences."""
        return len(self.kv.next_position)

    @staticmethod
    def stack(parts: Sequence[Shared]) -> Shared:
        """Put batches under each other, padded on the right to the longest."""

        def joined(streams: Sequence[Stream | None]) -> Stream | None:
            present = [stream for stream in streams if stream is not None]
            return Stream.stack(present) if present else None

        return Shared(
            KVState.stack([part.kv for part in parts]),
            joined([part.embeds for part in parts]),
            joined([part.inputs for part in parts]),
            joined([part.outputs for part in parts]),
            joined([part.branch for part in parts]),
        )

    def bytes(self) -> int:
        """Bytes of keys, values and hidden states, those of a branch included."""
        streams = {id(s): s for s in (self.embeds, self.inputs, self.outputs, self.branch) if s}
        states = [t for s in streams.values() for t in (s.hidden, *s.deepstack)]
        branch = self.kv.branch.bytes() if self.kv.branch is not None else []
        return sum([*self.kv.bytes(), *branch]) + sum(state.nbytes for state in states)
