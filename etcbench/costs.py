"""Sizes and prices that a cost model multiplies: one picture, one question, one method.

Everything is in multiply-accumulates (MAC) and in tokens. A family of backbones prices its vision
tower (`Tower`); a method prices its own work (`Compressor.own_macs`) from a `Case`. What is
counted are products of matrices and convolutions; sums, norms, softmaxes and sorting are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from etcbench.compressor import ModelSpec


@dataclass(frozen=True)
class Tower:
    """Prices of the vision side for one picture, in MAC.

    Attributes
    ----------
    encode : int
        The tower as transformers runs it: patch embedding, all layers, and what it projects.
    attention : int
        The part of it that is attention products.
    project : int
        The projector behind it, for each token; 0 where the tower projects itself.
    tokens : int
        Tokens that a compressor is shown, CLS included.
    row_setup, row : int
        ``VisionStates.attention_rows``: projections behind the rows, and each row.
    keys : int
        ``VisionStates.attention_keys``, asked for after rows.
    key_size : int
        Width of one of those keys.
    """

    encode: int
    attention: int
    project: int
    tokens: int
    row_setup: int
    row: int
    keys: int
    key_size: int

    def scores(self, rows: int) -> int:
        """Price of asking for so many attention rows."""
        return self.row_setup + rows * self.row


@dataclass(frozen=True)
class Case:
    """One question on one picture as a method meets it.

    Attributes
    ----------
    spec : ModelSpec
        The backbone.
    tower : Tower
        Prices of its vision side for this picture.
    visual : int
        Visual tokens of the picture before a method selects.
    entered : tuple of int
        Visual tokens at the input of each decoder layer.
    grid : tuple of int
        Their raster.
    before, bridge, learned, after : int
        Text in front of the picture, text between picture and learned tokens, learned tokens,
        text behind.
    question : int
        Tokens of the bare question, for methods that read it.
    marked : int
        Positions that the method's `mark` has marked; an estimate where nothing was run.
    shared : int
        Tokens of the prefix on which an earlier question has left the work of a method's own
        decoder layers.
    """

    spec: ModelSpec
    tower: Tower
    visual: int
    grid: tuple[int, int]
    entered: tuple[int, ...]
    before: int
    bridge: int
    learned: int
    after: int
    question: int
    marked: int = 0
    shared: int = 0

    @property
    def text(self) -> int:
        """Text tokens, in front of the picture and behind it."""
        return self.before + self.bridge + self.after

    def prompt(self, visual: int) -> int:
        """Length of the whole prompt with so many visual tokens."""
        return self.text + self.learned + visual

    def length(self, layer: int) -> int:
        """Length of the sequence at the input of a decoder layer."""
        return self.prompt(self.entered[layer])

    def prefix(self, layer: int) -> int:
        """Length at the input of a decoder layer without the text behind the picture."""
        return self.length(layer) - self.after

    def score_rows(
        self, rows: int, columns: int, keys_of: int = 0, heads: int | None = None
    ) -> int:
        """Price of attention rows from `etcbench.states.Attention`.

        Parameters
        ----------
        rows, columns : int
            Queries asked for, keys they meet.
        keys_of : int
            Tokens whose keys are computed anew because the layer has not run yet
            (``next_attention``); 0 where its keys are in the cache.
        heads : int, optional
            Query heads; default all.
        """
        spec = self.spec
        head = spec.hidden * spec.head_dim
        products = rows * columns * (heads or spec.heads) * spec.head_dim
        return rows * spec.heads * head + keys_of * spec.kv_heads * head + products

    def decoder_layer(self, queries: int, keys: int | None = None) -> int:
        """Price of a decoder layer on so many tokens (spec selective 1.4).

        Parameters
        ----------
        queries : int
            Tokens that run through it.
        keys : int, optional
            Tokens that they may attend to, themselves included; default: themselves. The product
            is counted whole, masked entries too.
        """
        return layer_macs(self.spec, queries, queries if keys is None else keys)


def matrix_macs(module: nn.Module, tokens: int) -> int:
    """Price of every linear layer (or stride-1 convolution) of a module, once for each token."""
    return tokens * sum(weight.numel() for weight in module.parameters() if weight.dim() > 1)


def layer_macs(spec: ModelSpec, queries: int, keys: int) -> int:
    """Price of a decoder layer: projections, two attention products, a gated MLP of 3 matrices.

    f(n) = n (2 d H d_h + 2 d H_kv d_h) + 2 n^2 H d_h + 3 n d m (spec selective 1.4).
    """
    width = spec.heads * spec.head_dim
    projections = 2 * spec.hidden * (width + spec.kv_heads * spec.head_dim)
    return queries * (projections + 3 * spec.hidden * spec.mlp) + 2 * queries * keys * width
