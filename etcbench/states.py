"""What a compressor is shown of a running model: plain tensors and a few things it may ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from etcbench.selection import Kind, Layout

# What of an answer its relevance is taken from (`etcbench.relevance`).
Weighting = Literal["gradient", "attention"]
Target = Literal["logit", "probability"]


@dataclass
class VisionStates:
    """The vision tower's output for a batch of pictures, before the projector.

    Attributes
    ----------
    features : Tensor, shape (pictures, tower tokens, width)
        Output of the feature layer; includes the CLS token in front if the tower has one. Where
        the tower itself merges patches, the merged tokens, padded to the largest picture.
    grid : Tensor, shape (pictures, 2)
        Raster (rows, columns) of the tokens.
    keys : sequence of str
        Identity of each picture; seeds anything random.
    has_cls : bool
        Whether index 0 is the CLS token.
    attention_rows : callable
        ``attention_rows(rows)`` with row numbers of shape (rows,) gives the feature layer's
        softmax attention, shape (pictures, heads, rows, tower tokens). Each row sums to one over
        its own picture; padded rows and columns are zero.
    attention_keys : callable
        ``attention_keys()`` gives that layer's keys averaged over the heads (and the patches of a
        merged token), after their rotary embedding if they have one, shape (pictures, tower
        tokens, head size).
    deepstack : tuple of Tensor, each of shape (pictures, tower tokens, hidden)
        Further features of the same tokens, to which every selection is applied too.
    """

    features: Tensor
    grid: Tensor
    keys: list[str]
    has_cls: bool
    attention_rows: Callable[[Tensor], Tensor]
    attention_keys: Callable[[], Tensor]
    deepstack: tuple[Tensor, ...] = ()


class Attention(Protocol):
    """Attention of one decoder layer for the rows that are asked for; computes nothing else."""

    def logits(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Scaled products of queries and keys without causality or softmax.

        Positions of shape (batch, rows) and (batch, columns), default all columns, give shape
        (batch, heads, rows, columns).
        """
        ...

    def weights(self, rows: Tensor) -> Tensor:
        """Causal softmax attention over all keys, shape (batch, heads, rows, tokens)."""
        ...

    def rotary_response(self, rows: Tensor) -> Tensor:
        """Scaled rotary product of all-ones queries and keys, fp32, shape (batch, rows, tokens)."""
        ...


@dataclass(frozen=True)
class PromptState:
    """What a compressor sees of an embedded prompt, question included, before layer 0 runs.

    Attributes
    ----------
    layout : Layout
        What each position is.
    attention : Attention
        What layer 0 would attend to if nothing were selected (spec selective 8.6).
    relevance : callable
        ``relevance(weighting, target)`` gives how much the answer relies on each position, shape
        (batch, tokens), fp32: a full run and a gradient pass per answer token, at every call
        (`etcbench.relevance`).
    """

    layout: Layout
    attention: Attention
    relevance: Callable[[Weighting, Target], Tensor]


@dataclass(frozen=True)
class PassStates:
    """What an auxiliary training loss sees of a batch's pass through the decoder.

    Only samples with a picture are shown; they are the first ones of the batch.

    Attributes
    ----------
    hidden : Tensor, shape (batch, tokens, hidden)
        Input of the layer that the loss asks for.
    outputs : Tensor, shape (batch, tokens, hidden)
        Output of the last layer, in front of the final norm.
    layout : Layout
        What each position is.
    grid : Tensor, long, shape (batch, 2)
        Raster of each sample's picture.
    attention : Attention
        That layer's, as plain causal attention within each turn.
    norm : callable
        The final norm.
    again : callable
        ``again(initial)`` gives the states of a second pass over the same samples, without
        gradients, learned tokens and bottleneck, by the model or by a copy of its initial weights.
    """

    hidden: Tensor
    outputs: Tensor
    layout: Layout
    grid: Tensor
    attention: Attention
    norm: Callable[[Tensor], Tensor]
    again: Callable[[bool], PassStates]


@dataclass(frozen=True)
class LayerState:
    """What a compressor sees after a decoder layer has run.

    Attributes
    ----------
    layer : int
        Index of the layer that has just run.
    hidden : Tensor, shape (batch, tokens, hidden)
        Its output.
    layout : Layout
        What each position is.
    origin : Layout
        What each position of layer 0 was.
    marks : Tensor or None, shape (batch, tokens)
        What the method's `mark` noted, carried along with the sequence.
    attention : Attention
        This layer's (spec selective 1.5).
    next_attention : Attention
        What the next layer would attend to if nothing were selected here.
    """

    layer: int
    hidden: Tensor
    layout: Layout
    origin: Layout
    marks: Tensor | None
    attention: Attention
    next_attention: Attention

    def original_counts(self) -> list[tuple[int, int]]:
        """Per row: visual tokens that entered the decoder, and pictures (at least 1)."""
        visual = self.origin.is_kind(Kind.VISUAL).sum(-1)
        pictures = (self.origin.image.amax(-1) + 1).clamp_min(1)
        return list(zip(visual.tolist(), pictures.tolist(), strict=True))
