"""What is kept of pictures for the questions that are still to come.

A method's reuse class says how much of a picture's work its questions share: the prefilled prefix
(``prefix``: its compressed KV cache; ``layers``: the lower layers with the states behind them;
``tokens``: the embedded visual tokens), or only the tower's output (``vision``). Both are kept in
the batches they were computed in, and found by content: a prefix by its pictures and the text in
front of them, a tower's output by its picture. Model, processor settings and method are those of
one engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from etcbench.kv import Shared

Batch = TypeVar("Batch")


@dataclass
class BatchCache(Generic[Batch]):
    """Batches of which the least recently used leave first.

    Attributes
    ----------
    limit : int
        Bytes that may be held between waves.
    bytes : int
        Bytes of what is held.
    """

    limit: int
    bytes: int = field(default=0, init=False)
    _batches: OrderedDict[int, tuple[Batch, list[Hashable], int]] = field(
        default_factory=OrderedDict, init=False
    )
    _places: dict[Hashable, tuple[int, int]] = field(default_factory=dict, init=False)
    _count: int = field(default=0, init=False)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    def add(self, keys: Sequence[Hashable], batch: Batch, size: int) -> None:
        """Keep a batch of ``size`` bytes; row ``i`` belongs to ``keys[i]``."""
        self._count += 1
        self._batches[self._count] = (batch, list(keys), size)
        self.bytes += size
        for row, key in enumerate(keys):
            self._places[key] = (self._count, row)

    def find(self, keys: Sequence[Hashable]) -> tuple[list[Batch], list[tuple[int, int]]]:
        """Return the batches that hold ``keys``, and for each key the number of one and a row."""
        places = [self._places[key] for key in keys]
        used = sorted({batch for batch, _ in places})
        for batch in used:
            self._batches.move_to_end(batch)
        return (
            [self._batches[batch][0] for batch in used],
            [(used.index(batch), row) for batch, row in places],
        )

    def trim(self, needed: Collection[Hashable] = ()) -> None:
        """Drop old batches until the limit holds, but none with a key that is needed next."""
        for batch in list(self._batches):
            if self.bytes <= self.limit:
                return
            if not any(key in needed for key in self._batches[batch][1]):
                self._drop(batch)

    def clear(self) -> None:
        """Drop everything, to make room."""
        self._batches.clear()
        self._places.clear()
        self.bytes = 0

    def _drop(self, batch: int) -> None:
        _, keys, size = self._batches.pop(batch)
        self.bytes -= size
        for key in keys:
            if self._places[key][0] == batch:
                del self._places[key]


def fan_out(batches: Sequence[Shared], places: Sequence[tuple[int, int]], room: int) -> Shared:
    """One row per place (batch, row), with ``room`` free places behind its tokens."""
    shared = batches[0] if len(batches) == 1 else Shared.stack(batches)
    offsets, total = [], 0
    for batch in batches:
        offsets.append(total)
        total += batch.rows_held
    index = [offsets[batch] + row for batch, row in places]
    return shared.rows(torch.tensor(index, device=shared.device), room)
