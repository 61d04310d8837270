"""Prefilled picture prefixes, kept for the questions that are still to come.

A prefix is what the method's reuse class lets the questions on a picture share: its compressed
KV cache (``prefix``), the lower layers with the states behind them (``layers``), or the embedded
visual tokens (``tokens``). Tokens that depend on the question (``vision``) are not kept. A prefix
is found by the content of its pictures and the text in front of them; model, processor settings
and method are those of one engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from etcbench.kv import Shared
from etcbench.waves import PrefixKey


@dataclass
class PrefixCache:
    """Least recently used prefixes leave first; they are kept and dropped in prefill batches.

    Attributes
    ----------
    limit : int
        Bytes that may be held between batches.
    bytes : int
        Bytes of what is held.
    """

    limit: int
    bytes: int = field(default=0, init=False)
    _batches: OrderedDict[int, tuple[Shared, list[PrefixKey]]] = field(default_factory=OrderedDict)
    _places: dict[PrefixKey, tuple[int, int]] = field(default_factory=dict)
    _count: int = 0

    def __contains__(self, key: PrefixKey) -> bool:
        return key in self._places

    def add(self, keys: Sequence[PrefixKey], shared: Shared) -> None:
        """Keep a prefilled batch; row ``i`` belongs to ``keys[i]``."""
        self._count += 1
        self._batches[self._count] = (shared, list(keys))
        self.bytes += shared.bytes()
        for row, key in enumerate(keys):
            self._places[key] = (self._count, row)

    def rows(self, keys: Sequence[PrefixKey], room: int) -> Shared:
        """Fan out: one row per key, with ``room`` free places behind it."""
        places = [self._places[key] for key in keys]
        used = sorted({batch for batch, _ in places})
        offset, total = {}, 0
        for batch in used:
            self._batches.move_to_end(batch)
            offset[batch], total = total, total + len(self._batches[batch][1])
        several = [self._batches[batch][0] for batch in used]
        shared = several[0] if len(several) == 1 else Shared.stack(several)
        index = [offset[batch] + row for batch, row in places]
        return shared.rows(torch.tensor(index, device=shared.device), room)

    def trim(self, needed: Collection[PrefixKey] = ()) -> None:
        """Drop old batches until the limit holds, but none with a prefix that is needed next."""
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
        shared, keys = self._batches.pop(batch)
        self.bytes -= shared.bytes()
        for key in keys:
            if self._places[key][0] == batch:
                del self._places[key]
