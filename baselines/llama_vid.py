"""LLaMA-VID: a context token for the question, and content tokens (arXiv 2311.17043).

From spec abstractive 4. A Q-Former reads the question in front of the picture; its queries attend
to the patches, and what they attend to, averaged, is the context token. Content tokens are the
pooled patches. The context token stands first, so nothing of the decoder's work is shared.

Decisions: a budget counts the context token too (L1, ``counts``); in training every turn has its
own tokens (4.2), and the turns of a conversation are trained apart. ``tower="backbone"`` puts the
method on the model's own tower and projector, and on other families; released weights have a tower
of their own (``eva-g``, at 224 pixels resized from the model's). On Qwen3-VL content tokens are
pooled behind the merger, which projects, and pool their DeepStack features too; the context token,
which shows no place, gets none. Positions: the context token, then a picture of as many tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from etcbench.baselines._llama_vid_release import KEYS
from torch import nn

from etcbench.compressor import Budget, Compressor, ModelSpec, Reuse
from etcbench.context import Branches
from etcbench.costs import Case
from etcbench.errors import BudgetError, UsageError, unknown_name
from etcbench.eva import GIANT, PATCH, EvaTower
from etcbench.grids import equal_sides, require_one_raster
from etcbench.qformer import QFormerShape
from etcbench.released import KeyMap
from etcbench.states import Questions, Resampled, VisionStates
from etcbench.wordpiece import WORDS, WordPiece

MOST = 24  # side of the largest square of content tokens where pictures have any shape


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
    counts : {"total", "content"}
        What a budget counts: all tokens (register L1), or all but the context token.
    image : int
        Pixels on a side that EVA-G sees.
    vocabulary : str, optional
        BERT's ``vocab.txt``; default: from the hub.
    """

    query_aware: ClassVar[bool] = True
    trained: ClassVar[bool] = True
    resamples: ClassVar[bool] = True
    released: ClassVar[KeyMap] = KEYS

    compress: str | None = None
    tower: Literal["backbone", "eva-g"] = "backbone"
    text: Literal["backbone", "bert"] = "backbone"
    queries: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    dropout: float = 0.1
    counts: Literal["total", "content"] = "total"
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
        require_one_raster(self.name(), spec)
        if self.image < 1 or self.image % PATCH:
            raise UsageError(f"llama-vid: image is a multiple of {PATCH} pixels, not {self.image}")
        side = self.image // PATCH
        raster = spec.grid if self.tower == "backbone" else (side, side)
        if self.tower == "eva-g" and spec.grid is None:
            raise UsageError(f"llama-vid: eva-g wants square pictures, {spec.name} has any shape")
        self.side = self._side(None if raster is None else raster[0], spec.name)
        self.branches = self._branches(spec).eval()
        self.tokenizer = WordPiece(self.vocabulary) if self.text == "bert" else None

    def _side(self, raster: int | None, model: str) -> int | None:
        """Side of the square of content tokens; None for all patches."""
        sides = equal_sides(raster) if raster else list(range(1, MOST))
        pools = {"null": raster or 0, "mean": 1, **{f"grid:{side}": side for side in sides}}
        context = int(self.counts == "total")
        if self.compress is None:
            asked = 0 if self.budget is None else self.budget.tokens - context
            side = next((side for side in sides if side**2 == asked), 0)
        elif self.compress in pools:
            sides = [side := pools[self.compress]]
        else:
            raise unknown_name(f"pooling of llama-vid for {model}", self.compress, pools)
        if self.budget is not None and self.budget.tokens != context + side**2:
            served = ", ".join(str(context + side**2) for side in sides if side)
            raise BudgetError(
                f"llama-vid cannot make {self.budget.tokens} tokens of {model}, the context token "
                f"{'included' if context else 'not counted'}; it can make "
                f"{served or 'as many as a picture has: leave out --tokens'}"
            )
        return None if side in (0, raster) else side

    def _branches(self, spec: ModelSpec) -> Branches:
        of_eva, own_words = self.tower == "eva-g", self.text == "bert"
        shape = QFormerShape(
            self.width,
            self.depth,
            self.heads,
            GIANT.width if of_eva else spec.feature_width,
            WORDS if own_words else spec.hidden,
            own_words,
            self.dropout,
        )
        return Branches(shape, self.queries, spec.hidden, EvaTower(GIANT) if of_eva else None)

    @property
    def separate_turns(self) -> bool:
        """Each turn's context token is made for its question."""
        return True

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

    def projected(self, tokens: int) -> int:
        """Count the content, unless another tower brings a projector of its own."""
        content = tokens if self.side is None else min(self.side**2, tokens)
        return 0 if self.branches.eva is not None else content

    def own_macs(self, case: Case) -> int:
        """Count the Q-Former on the question, and what turns its queries into a token."""
        content = case.entered[0] - 1
        if self.branches.eva is None:
            return self.branches.macs(case.question, case.tower.tokens, case.visual, content)
        patches = (self.image // PATCH) ** 2
        tower = self.branches.eva.macs(patches)
        return tower + self.branches.macs(case.question, patches + 1, patches, content)

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


METHOD = LlamaVid
