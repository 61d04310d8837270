"""LLaMA-VID: a context token for the question, and content tokens (arXiv 2311.17043).

From spec abstractive 4. A Q-Former reads the question in front of the picture; its queries attend
to the patches, and what they attend to, averaged, is the context token. Content tokens are the
pooled patches. The context token stands first, so nothing of the decoder's work is shared.

Decisions: a budget counts the context token too (L1); in training every turn has its own tokens
(4.2), and the turns of a conversation are trained apart. ``tower="backbone"`` puts the method on
the model's own tower and projector, and on other families; released weights have a tower of their
own (``eva-g``, at 224 pixels resized from the model's). On Qwen3-VL content tokens are pooled
behind the merger, which projects, and pool their DeepStack features too; the context token, which
shows no place, gets none. Positions: the context token, then a picture of as many tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from etcbench.baselines._llama_vid_release import KEYS
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from etcbench.compressor import Budget, Compressor, ModelSpec, Reuse
from etcbench.errors import BudgetError, UsageError
from etcbench.eva import GIANT, PATCH, EvaTower
from etcbench.qformer import QFormer, QFormerShape
from etcbench.released import KeyMap
from etcbench.states import Questions, Resampled, VisionStates
from etcbench.wordpiece import WORDS, WordPiece


@dataclass(eq=False)
class LlamaVid(Compressor):
    """One context token and pooled content tokens.

    Parameters
    ----------
    compress : str, optional
        Pooling of the content: ``null`` (none), ``mean`` (one token) or ``grid:g`` (g x g tokens);
        default: what the budget says.
    tower : {"backbone", "eva-g"}
        Whose features.
    text : {"backbone", "bert"}
        What the Q-Former reads: the language model's word embeddings through a linear map, or
        BERT's word pieces with embeddings of its own.
    queries, width, depth, heads : int
        Of the Q-Former.
    dropout : float
        In the Q-Former while training.
    image : int
        Pixels on a side that EVA-G sees.
    vocabulary : str, optional
        BERT's ``vocab.txt``; default: from the hub.
    """

    query_aware: ClassVar[bool] = True
    trained: ClassVar[bool] = True
    resamples: ClassVar[bool] = True
    separate_turns: ClassVar[bool] = True
    released: ClassVar[KeyMap] = KEYS

    compress: str | None = None
    tower: Literal["backbone", "eva-g"] = "backbone"
    text: Literal["backbone", "bert"] = "backbone"
    queries: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    dropout: float = 0.1
    image: int = 336
    vocabulary: str | None = None

    @classmethod
    def budget_in(cls, options: dict[str, Any]) -> bool:
        """``compress`` says it."""
        return options.get("compress") is not None

    @classmethod
    def check_budget(cls, budget: Budget, spec: ModelSpec) -> None:
        """Left to `prepare`: with the context token there can be one more than patches."""

    def prepare(self, spec: ModelSpec) -> None:
        """Settle the pooling; create the module."""
        side = self.image // PATCH
        raster = spec.grid if self.tower == "backbone" else (side, side)
        if self.tower == "eva-g" and spec.grid is None:
            raise UsageError(f"llama-vid: eva-g wants square pictures, {spec.name} has any shape")
        self.side = self._side(None if raster is None else raster[0], spec.name)
        self.branches = Branches(self, spec).eval()
        self.tokenizer = WordPiece(self.vocabulary) if self.text == "bert" else None

    def _side(self, raster: int | None, model: str) -> int | None:
        """Side of the square of content tokens; None for all patches.

        Raises
        ------
        UsageError
            If there is no such pooling; a `BudgetError` if it is not what the budget says.
        """
        asked = None if self.budget is None else self.budget.tokens - 1
        sides = [n for n in range(1, (raster or 64) + 1) if raster is None or raster % n == 0]
        name, _, number = (self.compress or "").partition(":")
        if name == "grid" and number.isdigit() and int(number) in sides:
            side = int(number)
        elif name in ("mean", "null") and not number:
            side = 1 if name == "mean" else raster or 0
        elif self.compress is not None:
            raise UsageError(
                f"llama-vid: compress={self.compress} is no pooling for {model}: null, mean, or "
                f"grid:g with g one of {', '.join(map(str, sides))}"
            )
        else:
            side = next((n for n in sides if n * n == asked), 0)
        if asked is not None and side * side != asked:
            served = (
                [str(1 + n * n) for n in sides] if self.compress is None else [str(1 + side**2)]
            )
            raise BudgetError(
                f"llama-vid cannot make {asked + 1} tokens of {model}, the context token included"
                + (f", with compress={self.compress}" if self.compress else "")
                + (f"; it can make {', '.join(served)}" if side or self.compress is None else "")
            )
        return None if side in (0, raster) else side

    @property
    def reuse(self) -> Reuse:
        """The tower's output."""
        return "vision"

    @property
    def module(self) -> nn.Module:
        """Everything behind the tower."""
        return self.branches

    def schedule(self, visual_tokens: int, layers: int) -> list[int]:
        """Every layer holds the context token and the content."""
        content = visual_tokens if self.side is None else min(self.side**2, visual_tokens)
        return [1 + content] * layers

    def resample(self, vision: VisionStates, questions: Questions) -> Resampled:
        """Make the context token for the question, and pool the content."""
        device = vision.grid.device
        if self.tokenizer is None:
            words, present = questions.words()
        else:
            bare = [text.replace("\n", "").strip() for text in questions.texts]
            words, present = (part.to(device) for part in self.tokenizer(bare))
        if self.branches.eva is not None:
            assert vision.pixels is not None
            pixels = F.interpolate(
                vision.pixels.float(), self.image, mode="bicubic", antialias=True
            )
            side = vision.grid.new_tensor([self.image // PATCH] * 2)
            vision = replace(
                vision, features=self.branches.eva(pixels), grid=side.expand_as(vision.grid)
            )
        return self.branches(vision, words, present, self.side)


class Branches(nn.Module):
    """The context branch and the content branch.

    Parameters
    ----------
    method : LlamaVid
        The options.
    spec : ModelSpec
        The backbone.
    """

    def __init__(self, method: LlamaVid, spec: ModelSpec) -> None:
        super().__init__()
        of_eva, own_words = method.tower == "eva-g", method.text == "bert"
        width = GIANT.width if of_eva else spec.feature_width
        words = WORDS if own_words else spec.hidden
        shape = QFormerShape(
            method.width, method.depth, method.heads, width, words, own_words, method.dropout
        )
        self.eva = EvaTower(GIANT) if of_eva else None
        self.query_tokens = nn.Parameter(torch.randn(1, method.queries, method.width) * 0.02)
        self.ln_vision, self.qformer = nn.LayerNorm(width), QFormer(shape)
        self.W_q = nn.Linear(method.width, width)
        self.W_k = nn.Linear(width, width)
        self.W_v = nn.Linear(width, spec.hidden)
        mlp = (nn.Linear(width, spec.hidden), nn.GELU(), nn.Linear(spec.hidden, spec.hidden))
        self.content_mlp = nn.Sequential(*mlp) if of_eva else None

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


def _pooled(
    patches: Tensor, rasters: list[tuple[int, int]], coarse: list[tuple[int, int]]
) -> Tensor:
    """Average over the cells of coarser rasters; (pictures, cells, width), padded on the right."""
    rows = [
        F.adaptive_avg_pool2d(one[: h * w].T.unflatten(1, (h, w)), cells).flatten(1).T
        for one, (h, w), cells in zip(patches, rasters, coarse, strict=True)
    ]
    return pad_sequence(rows, batch_first=True)


METHOD = LlamaVid
