"""Attention of one decoder layer, recomputed for a few rows under any backend.

The model runs under SDPA, which shows no weights. A method that needs some gets them from the
layer's projections and the keys in the cache (spec selective 1.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from etcbench.backbones.base import Backbone
from etcbench.backbones.stream import Stream


@dataclass(frozen=True)
class LayerAttention:
    """Queries against keys of one layer; what `etcbench.compressor.Attention` asks for.

    Attributes
    ----------
    backbone : Backbone
        The model.
    layer : int or nn.Module
        Whose projections are used: of the backbone's layer of that number, or of this one.
    inputs : Stream
        That layer's input.
    cached : Tensor or None, shape (batch, kv heads, tokens, head size)
        Its post-rotary keys; None where the layer has not run yet.
    tables : tuple of Tensor, optional, each of shape (batch, tokens, head size)
        Cosine and sine at the input's positions, where the layer loop has them.
    """

    backbone: Backbone
    layer: int | nn.Module
    inputs: Stream
    cached: Tensor | None
    tables: tuple[Tensor, Tensor] | None = None

    @cached_property
    def keys(self) -> Tensor:
        """Post-rotary keys, (batch, kv heads, tokens, head size); computed once if not cached."""
        if self.cached is not None:
            return self.cached
        return self.backbone.keys(self.layer, self._normed, self._rotary)

    @cached_property
    def _normed(self) -> Tensor:
        return self.backbone.normed(self.layer, self.inputs.hidden)

    def _normed_at(self, batch: Tensor, places: Tensor) -> Tensor:
        if self.cached is None:
            return self._normed[batch, places]
        return self.backbone.normed(self.layer, self.inputs.hidden[batch, places])

    @cached_property
    def _rotary(self) -> tuple[Tensor, Tensor]:
        return self.tables or self.backbone.rotary(self.inputs.hidden, self.inputs.layout.positions)

    def logits(
        self,
        rows: Tensor,
        columns: Tensor | None = None,
        gates: tuple[nn.Module, nn.Module] | None = None,
    ) -> Tensor:
        """Scaled products of queries and keys, without causality or softmax.

        Parameters
        ----------
        rows : Tensor, long, shape (batch, rows)
            Positions of the queries.
        columns : Tensor, optional, long, shape (batch, columns)
            Positions of the keys; default all.
        gates : tuple of nn.Module, optional
            Give, from the layer's normed inputs, factors of the queries and of the keys, shape
            (batch, rows or columns, heads or kv heads * head size).

        Returns
        -------
        Tensor
            Shape (batch, heads, rows, columns).
        """
        batch = torch.arange(len(rows), device=rows.device)[:, None]
        cosine, sine = self._rotary
        normed = self._normed_at(batch, rows)
        query = self.backbone.queries(self.layer, normed, (cosine[batch, rows], sine[batch, rows]))
        keys = self.keys
        if columns is not None:
            keys = keys.transpose(1, 2)[batch, columns].transpose(1, 2)
        if gates is not None:
            inputs = self._normed if columns is None else self._normed_at(batch, columns)
            query = query * self._factors(gates[0](normed), query)
            keys = keys * self._factors(gates[1](inputs), keys)
        # Rows of the query heads that share a key head stand under each other: no key is copied.
        shared = query.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
        scores = shared @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        return scores.view(*query.shape[:3], -1)

    @staticmethod
    def _factors(factors: Tensor, like: Tensor) -> Tensor:
        return factors.unflatten(-1, (-1, like.shape[-1])).transpose(1, 2)

    def weights(self, rows: Tensor) -> Tensor:
        """Causal softmax attention of ``rows`` over all keys, as the layer computes it.

        Where several turns share a sequence, a row sees its own turn and what belongs to none.

        Parameters
        ----------
        rows : Tensor, long, shape (batch, rows)
            Positions of the queries.

        Returns
        -------
        Tensor
            Shape (batch, heads, rows, tokens), softmax in fp32; zero where a query sees no key.
        """
        layout = self.inputs.layout
        order = torch.arange(layout.tokens, device=rows.device)
        seen = (order <= rows[..., None]) & layout.valid[:, None]
        seen = seen & layout.same_turn(layout.turn.gather(1, rows))
        scores = self.logits(rows)
        masked = scores.masked_fill(~seen[:, None], float("-inf"))
        return masked.float().softmax(-1).nan_to_num().to(scores.dtype)

    def rotary_response(self, rows: Tensor) -> Tensor:
        """Scaled product of a query and a key that are all ones before the rotary embedding.

        It says how much the positions alone favour a key (spec selective 3.7).

        Parameters
        ----------
        rows : Tensor, long, shape (batch, rows)
            Positions of the queries.

        Returns
        -------
        Tensor
            fp32, shape (batch, rows, tokens).
        """
        tables = self.backbone.rotary(self.inputs.hidden.float(), self.inputs.layout.positions)
        # The cross terms of sine and cosine cancel between the halves of a head.
        both = torch.cat(tables, -1)
        batch = torch.arange(len(rows), device=rows.device)[:, None]
        return both[batch, rows] @ both.transpose(-1, -2) * tables[0].shape[-1] ** -0.5
