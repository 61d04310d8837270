"""A KV cache with room behind its tokens, into which new ones are written.

transformers' dynamic cache copies everything it holds for each new token. With short answers and
prefixes that serve many questions, these copies cost as much as the attention itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# Free places behind the tokens whenever they have to be moved, and their share of the tokens.
ROOM = 32
SHARE = 8


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, views of storage of shape (batch, places, heads, size)."""

    def __init__(self) -> None:
        super().__init__()
        self._stores: list[Tensor | None] = [None, None]

    @classmethod
    def of(cls, layer: Any, index: Tensor, room: int) -> GrowingLayer:
        """Copy (or repeat) sequences of a layer, with ``room`` free places behind them."""
        copied = cls()
        copied.lazy_initialization(layer.keys, layer.values)
        copied.keys = copied._moved(0, layer.keys, room, index)
        copied.values = copied._moved(1, layer.values, room, index)
        return copied

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, shape (batch, heads, tokens, size); returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        else:
            assert self.keys is not None and self.values is not None
            self.keys = self._appended(0, self.keys, key_states)
            self.values = self._appended(1, self.values, value_states)
        return self.keys, self.values

    def _appended(self, which: int, held: Tensor, new: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (held.requires_grad or new.requires_grad):
            return torch.cat([held, new], -2)
        tokens, store = held.shape[-2], self._stores[which]
        end = tokens + new.shape[-2]
        # Somebody may have put other tensors in place of the views, e.g. to evict tokens.
        own = (
            store is not None
            and held.data_ptr() == store.data_ptr()
            and held.stride() == store.transpose(1, 2).stride()
            and end <= store.shape[1]
        )
        if not own:
            self._moved(which, held, new.shape[-2] + max(ROOM, tokens // SHARE))
            store = self._stores[which]
        assert store is not None
        store[:, tokens:end] = new.transpose(1, 2)
        return store[:, :end].transpose(1, 2)

    def _moved(self, which: int, held: Tensor, room: int, index: Tensor | None = None) -> Tensor:
        """Copy to new storage with ``room`` free places."""
        source = held.transpose(1, 2)
        rows, tokens = len(source) if index is None else len(index), source.shape[1]
        store = source.new_empty((rows, tokens + room, *source.shape[2:]))
        if index is None:
            store[:, :tokens] = source
        else:
            torch.index_select(source, 0, index, out=store[:, :tokens])
        self._stores[which] = store
        return store[:, :tokens].transpose(1, 2)


class GrowingCache(Cache):
    """One `GrowingLayer` per decoder layer, created when the layer first runs."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)

    def rows(self, index: Tensor, room: int = ROOM) -> GrowingCache:
        """Copy (or repeat) sequences, with ``room`` free places behind their tokens."""
        copied = GrowingCache()
        held: list[Any] = list(self.layers)
        for layer in held:
            filled = layer.keys is not None
            copied.layers.append(GrowingLayer.of(layer, index, room) if filled else GrowingLayer())
        return copied

    @staticmethod
    def stack(parts: Sequence[GrowingCache]) -> GrowingCache:
        """Put batches under each other, padded on the right to the longest."""
        stacked = GrowingCache()
        every: list[list[Any]] = [list(part.layers) for part in parts]
        for layers in zip(*every, strict=True):
            layer = GrowingLayer()
            if layers[0].keys is not None:
                width = max(one.keys.shape[2] for one in layers)
                keys, values = (
                    torch.cat([F.pad(one, (0, 0, 0, width - one.shape[2])) for one in tensors])
                    for tensors in ([one.keys for one in layers], [one.values for one in layers])
                )
                layer.update(keys, values)
            stacked.layers.append(layer)
        return stacked
