"""LLaMA-VID's two branches: a token of what a question looks at, and pooled patches.

A Q-Former reads the question in front of the picture; its queries attend to the patches with a
single head, and what they find, averaged, is the context token (spec abstractive 4.1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from etcbench.costs import matrix_macs
from etcbench.eva import EvaTower
from etcbench.options import require_positive
from etcbench.qformer import QFormer, QFormerShape
from etcbench.states import Resampled, VisionStates


class Branches(nn.Module):
    """The context branch and the content branch.

    Parameters
    ----------
    shape : QFormerShape
        Of the Q-Former; says how wide the picture's features are.
    queries, hidden : int
        Queries of the Q-Former; width of the decoder.
    eva : EvaTower or None
        A tower of its own, which brings a projector of its own.
    """

    def __init__(
        self, shape: QFormerShape, queries: int, hidden: int, eva: EvaTower | None
    ) -> None:
        super().__init__()
        require_positive("Q-Former", queries=queries)
        width = shape.picture
        self.eva = eva
        self.query_tokens = nn.Parameter(torch.randn(1, queries, shape.width) * 0.02)
        self.ln_vision, self.qformer = nn.LayerNorm(width), QFormer(shape)
        self.W_q = nn.Linear(shape.width, width)
        self.W_k = nn.Linear(width, width)
        self.W_v = nn.Linear(width, hidden)
        mlp = (nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.content_mlp = None if eva is None else nn.Sequential(*mlp)

    def forward(
        self, vision: VisionStates, words: Tensor, present: Tensor, side: int | None
    ) -> Resampled:
        """Make the tokens of each picture; ``side`` is that of the content, None for no pooling."""
        first, members = vision.distinct
        once = vision.rows(first)
        kind = self.W_k.weight.dtype
        features = once.features.to(kind)
        patches, seen = once.patches
        patches = patches.to(kind)
        everything = torch.cat(
            [seen.new_ones(len(seen), features.shape[1] - seen.shape[1]), seen], 1
        )
        queries = self.query_tokens.expand(len(words), -1, -1)
        found = self.qformer(queries, words, present, self.ln_vision(features), everything, members)
        scores = self.W_q(found) @ self.W_k(patches)[members].mT * patches.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen[members][:, None], -torch.inf).softmax(-1).mean(1)
        context = self.W_v((weights[:, None] @ patches[members])[:, 0])
        grid = (
            once.rasters
            if side is None
            else [(min(side, h), min(side, w)) for h, w in once.rasters]
        )
        pooled = _pooled(patches, once.rasters, grid)
        content = vision.project(pooled) if self.content_mlp is None else self.content_mlp(pooled)
        deepstack = tuple(_pooled(part, once.rasters, grid)[members] for part in once.deepstack)
        return Resampled(
            torch.cat([context[:, None], content[members].to(context)], 1),
            lead=1,
            grid=torch.tensor(grid)[members.cpu()],
            deepstack=tuple(F.pad(part, (0, 0, 1, 0)) for part in deepstack),
        )

    def macs(self, words: int, tokens: int, patches: int, content: int) -> int:
        """Count the multiply-accumulates behind the tower, its CLS among the ``tokens``."""
        queries, width = self.query_tokens.shape[1], self.W_k.in_features
        total = self.qformer.macs(queries, words, tokens) + matrix_macs(self.W_q, queries)
        total += matrix_macs(self.W_k, patches) + (queries + 1) * patches * width
        total += matrix_macs(self.W_v, 1)
        return total + (matrix_macs(self.content_mlp, content) if self.content_mlp else 0)


def _pooled(
    patches: Tensor, rasters: list[tuple[int, int]], coarse: list[tuple[int, int]]
) -> Tensor:
    """Average over the cells of coarser rasters; (pictures, cells, width), padded on the right."""
    rows = [
        F.adaptive_avg_pool2d(one[: h * w].T.unflatten(1, (h, w)), cells).flatten(1).T
        for one, (h, w), cells in zip(patches, rasters, coarse, strict=True)
    ]
    return pad_sequence(rows, batch_first=True)
