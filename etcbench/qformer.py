"""InstructBLIP's Q-Former in plain torch: queries that read a text and look at a picture.

A post-norm BERT: joint self-attention over queries and text, cross-attention of the queries in
every other layer, feed-forward parts of their own for queries and text (spec abstractive 4.1).
Names of the parameters are those of transformers' `InstructBlipQFormerModel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etcbench.costs import matrix_macs
from etcbench.errors import UsageError
from etcbench.options import require_positive

EPS = 1e-12
POSITIONS = 512


@dataclass(frozen=True)
class QFormerShape:
    """Sizes of a Q-Former.

    Attributes
    ----------
    width, depth, heads : int
        Hidden size, layers, attention heads.
    picture : int
        Width of the picture's features.
    words : int
        Entries of its own vocabulary, or the width of word embeddings that come from elsewhere.
    own_words : bool
        Which of the two.
    dropout : float
        Everywhere in training.
    """

    width: int
    depth: int
    heads: int
    picture: int
    words: int
    own_words: bool
    dropout: float

    def __post_init__(self) -> None:
        require_positive("Q-Former", width=self.width, depth=self.depth, heads=self.heads)
        if self.width % self.heads:
            raise UsageError(f"Q-Former: {self.heads} heads do not divide its width, {self.width}")
        if not 0 <= self.dropout <= 1:
            raise UsageError(f"Q-Former: dropout is a share from 0 to 1, not {self.dropout}")


class QFormer(nn.Module):
    """Queries that read a text and look at a picture."""

    def __init__(self, shape: QFormerShape) -> None:
        super().__init__()
        self.embeddings = Embeddings(shape)
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(Layer(shape, number % 2 == 0) for number in range(shape.depth))}
        )
        self.apply(_started)

    def forward(
        self,
        queries: Tensor,
        words: Tensor,
        present: Tensor,
        picture: Tensor,
        seen: Tensor,
        members: Tensor,
    ) -> Tensor:
        """Read texts in front of pictures.

        Parameters
        ----------
        queries : Tensor, shape (texts, queries, width)
            Learned queries.
        words : Tensor, shape (texts, words) or (texts, words, word width)
            Ids of the own vocabulary, or word embeddings from elsewhere; padded on the right.
        present : Tensor, bool, shape (texts, words)
            Which words are no padding.
        picture, seen : Tensor, shape (pictures, patches, picture width); bool (pictures, patches)
            Features of each picture, and which are no padding.
        members : Tensor, long, shape (texts,)
            Which picture each text is about.

        Returns
        -------
        Tensor
            Shape (texts, queries, width).
        """
        count = queries.shape[1]
        hidden = self.embeddings(queries, words)
        everywhere = torch.cat([present.new_ones(len(present), count), present], 1)
        layers: Any = self.encoder["layer"]
        for layer in layers:
            hidden = layer(hidden, count, everywhere, picture, seen, members)
        return hidden[:, :count]

    def macs(self, queries: int, words: int, picture: int) -> int:
        """Count the multiply-accumulates of a text in front of ``picture`` tokens."""
        table = self.embeddings.word_embeddings
        total = matrix_macs(table, words) if isinstance(table, nn.Linear) else 0
        both = queries + words
        layers: Any = self.encoder["layer"]
        for layer in layers:
            total += layer.attention.macs(both, both)
            if layer.crossattention is not None:
                total += layer.crossattention.macs(queries, picture)
            for part, tokens in ((layer.intermediate, words), (layer.intermediate_query, queries)):
                total += 2 * matrix_macs(part, tokens)  # there and back
        return total


class Embeddings(nn.Module):
    """Words and their positions, behind the queries, which have none."""

    def __init__(self, shape: QFormerShape) -> None:
        super().__init__()
        kind = nn.Embedding if shape.own_words else nn.Linear
        self.word_embeddings = kind(shape.words, shape.width)
        self.position_embeddings = nn.Embedding(POSITIONS, shape.width)
        self.layernorm = nn.LayerNorm(shape.width, eps=EPS)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, queries: Tensor, words: Tensor) -> Tensor:
        """Embed; shape (texts, queries + words, width)."""
        embedded = self.word_embeddings(words)
        embedded = embedded + self.position_embeddings.weight[: words.shape[1]]
        return self.dropout(self.layernorm(torch.cat([queries.to(embedded), embedded], 1)))


class Layer(nn.Module):
    """One layer; ``looks`` says whether its queries attend to the picture."""

    def __init__(self, shape: QFormerShape, looks: bool) -> None:
        super().__init__()
        self.attention = Attention(shape, shape.width)
        self.crossattention = Attention(shape, shape.picture) if looks else None
        inner = 4 * shape.width
        self.intermediate, self.intermediate_query = (
            nn.ModuleDict({"dense": nn.Linear(shape.width, inner)}) for _ in range(2)
        )
        self.output, self.output_query = (Output(shape, inner) for _ in range(2))

    def forward(
        self,
        hidden: Tensor,
        count: int,
        present: Tensor,
        picture: Tensor,
        seen: Tensor,
        members: Tensor,
    ) -> Tensor:
        """Run the layer; the first ``count`` positions are queries."""
        hidden = self.attention(hidden, hidden, present)
        queries, text = hidden[:, :count], hidden[:, count:]
        if self.crossattention is not None:
            queries = self.crossattention(queries, picture, seen, members)
        queries = self.output_query(F.gelu(self.intermediate_query["dense"](queries)), queries)
        text = self.output(F.gelu(self.intermediate["dense"](text)), text)
        return torch.cat([queries, text], 1)


class Attention(nn.Module):
    """Multi-head attention with its residual and norm."""

    def __init__(self, shape: QFormerShape, inputs: int) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.dropout
        self.attention = nn.ModuleDict(
            {
                "query": nn.Linear(shape.width, shape.width),
                "key": nn.Linear(inputs, shape.width),
                "value": nn.Linear(inputs, shape.width),
            }
        )
        self.output = Output(shape, shape.width)

    def forward(
        self, hidden: Tensor, source: Tensor, present: Tensor, members: Tensor | None = None
    ) -> Tensor:
        """Attend from ``hidden`` to the present positions of ``source``, row ``members[i]``."""

        def split(part: str, values: Tensor) -> Tensor:
            return self.attention[part](values).unflatten(-1, (self.heads, -1)).transpose(1, 2)

        key, value = split("key", source), split("value", source)
        if members is not None:
            key, value, present = key[members], value[members], present[members]
        mixed = F.scaled_dot_product_attention(
            split("query", hidden), key, value, attn_mask=present[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.output(mixed.transpose(1, 2).flatten(2), hidden)

    def macs(self, tokens: int, source: int) -> int:
        """Count the multiply-accumulates of ``tokens`` that attend to ``source`` others."""
        own = matrix_macs(self.attention["query"], tokens) + matrix_macs(self.output, tokens)
        others = sum(matrix_macs(self.attention[part], source) for part in ("key", "value"))
        return own + others + 2 * tokens * source * self.output.dense.out_features


class Output(nn.Module):
    """Linear map, dropout, residual, norm."""

    def __init__(self, shape: QFormerShape, inputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, shape.width)
        self.LayerNorm = nn.LayerNorm(shape.width, eps=EPS)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Map ``hidden`` and add ``residual``."""
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


def _started(module: nn.Module) -> None:
    """Draw weights as BERT does."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
