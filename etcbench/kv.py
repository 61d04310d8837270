"""What a decoder remembers of a batch of sequences: keys, values, and what each of them is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

    def keep(self, layer: int, selection: Selection) -> None:
        """Drop entries of one layer's cache."""
        entry = self.entries[layer]
        entry.keys = selection.gather(entry.keys.transpose(1, 2)).transpose(1, 2)
        entry.values = selection.gather(entry.values.transpose(1, 2)).transpose(1, 2)

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
