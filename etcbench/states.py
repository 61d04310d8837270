"""What a compressor is shown of a running model: plain tensors and a few things it may ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from etcbench.selection import Layout

Weighting = Literal["gradient", "attention"]
Target = Literal["logit", "probability"]
Signs = Literal["positive", "both"]


@dataclass(frozen=True)
class RelevanceRule:
    """How relevance is computed (spec selective 8.2; `etcbench.relevance`).

    Attributes
    ----------
    weighting : {"gradient", "attention"}
        Attention times its gradient, or attention alone (the ablation of 8.4).
    target : {"logit", "probability"}
        What of an answer token the gradient is taken of.
    signs : {"positive", "both"}
        Whether only what speaks for the answer counts, or also what speaks against it.
    """

    weighting: Weighting = "gradient"
    target: Target = "logit"
    signs: Signs = "positive"


def _as_it_is(features: Tensor) -> Tensor:
    return features


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
    layer_features : callable
        ``layer_features(k)`` gives the output of the tower's layer ``k - 1`` (0: its input), of
        the shape of ``features``; None where the tower merges patches behind its last layer.
    pixels : Tensor or None, shape (pictures, channels, height, width)
        Normalised pictures, where they have one shape.
    project : callable
        The model's own projector, from the width of ``features`` to the decoder's; features that
        are projected already come back as they are.
    """

    features: Tensor
    grid: Tensor
    keys: list[str]
    has_cls: bool
    attention_rows: Callable[[Tensor], Tensor]
    attention_keys: Callable[[], Tensor]
    deepstack: tuple[Tensor, ...] = ()
    layer_features: Callable[[int], Tensor] | None = None
    pixels: Tensor | None = None
    project: Callable[[Tensor], Tensor] = field(default=_as_it_is)

    @property
    def patches(self) -> tuple[Tensor, Tensor]:
        """Features without the CLS token, and which of them are no padding.

        Shapes (pictures, patches, width) and bool (pictures, patches).
        """
        features = self.features[:, int(self.has_cls) :]
        places = torch.arange(features.shape[1], device=features.device)
        return features, places < self.grid.prod(-1, keepdim=True)

    @property
    def rasters(self) -> list[tuple[int, int]]:
        """Rows and columns of each picture."""
        return [(rows, columns) for rows, columns in self.grid.tolist()]

    @property
    def shown(self) -> list[str]:
        """Identity of each picture behind the projector."""
        return self.keys

    @property
    def distinct(self) -> tuple[Tensor, Tensor]:
        """First row of each picture, and which of these pictures each row shows."""
        keys = list(dict.fromkeys(self.keys))
        first = [self.keys.index(key) for key in keys]
        number = dict(zip(keys, range(len(keys)), strict=True))
        device = self.grid.device
        members = [number[key] for key in self.keys]
        return torch.tensor(first, device=device), torch.tensor(members, device=device)

    def rows(self, index: Tensor) -> VisionStates:
        """Take (or repeat) whole pictures."""
        layers = self.layer_features
        return replace(
            self,
            features=self.features[index],
            grid=self.grid[index],
            keys=[self.keys[number] for number in index.tolist()],
            attention_rows=lambda rows: self.attention_rows(rows)[index],
            attention_keys=lambda: self.attention_keys()[index],
            deepstack=tuple(features[index] for features in self.deepstack),
            layer_features=None if layers is None else lambda layer: layers(layer)[index],
            pixels=None if self.pixels is None else self.pixels[index],
        )


@dataclass(frozen=True)
class Questions:
    """The question on each picture of a batch, as a method may read it.

    Attributes
    ----------
    texts : list of str
        User text without the image line: question, options and answer instruction.
    states : callable
        ``states()`` gives, shape (questions, hidden), what the language model itself makes of the
        bare text (BOS where the tokenizer has one, no template, no picture): its last layer's
        state after the final norm at the last token, without gradient.
    words : callable
        ``words()`` gives the language model's token embeddings of the bare text, without gradient,
        and which are no padding: (questions, tokens, hidden) and bool (questions, tokens).
    """

    texts: list[str]
    states: Callable[[], Tensor]
    words: Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Resampled:
    """Tokens that a method has made to stand for each picture.

    Attributes
    ----------
    embeds : Tensor, shape (pictures, tokens, hidden)
        Embeddings, padded on the right.
    lead : int
        Tokens in front that show no particular place: positions advance with each of them.
    grid : Tensor or None, long, shape (pictures, 2)
        Raster (rows, columns) of the tokens behind the lead, which stand like a picture of that
        size; None where all tokens are lead.
    deepstack : tuple of Tensor, each of shape (pictures, tokens, hidden)
        What the tokens add behind the first decoder layers; empty for nothing.
    """

    embeds: Tensor
    lead: int = 0
    grid: Tensor | None = None
    deepstack: tuple[Tensor, ...] = ()


class Attention(Protocol):
    """Attention of one decoder layer for the rows that are asked for; computes nothing else."""

    def logits(
        self,
        rows: Tensor,
        columns: Tensor | None = None,
        gates: tuple[nn.Module, nn.Module] | None = None,
    ) -> Tensor:
        """Scaled products of queries and keys without causality or softmax.

        Positions of shape (batch, rows) and (batch, columns), default all columns, give shape
        (batch, heads, rows, columns). Gates make factors of queries and keys from the layer's
        normed inputs.
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
        ``relevance(rule)`` gives how much the answer relies on each position, shape
        (batch, tokens), fp32: a full run and a gradient pass per answer token, at every call
        (`etcbench.relevance`).
    """

    layout: Layout
    attention: Attention
    relevance: Callable[[RelevanceRule], Tensor]


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
    branch : Attention or None
        That of the last layer of the method's branch, which has run on this layer's output.
    """

    layer: int
    hidden: Tensor
    layout: Layout
    origin: Layout
    marks: Tensor | None
    attention: Attention
    next_attention: Attention
    branch: Attention | None = None

    def original_counts(self) -> list[tuple[int, int]]:
        """Per row: visual tokens that entered the decoder, and pictures (at least 1)."""
        return self.origin.visual_counts
