"""MQT-LLaVA: nested queries, any number of which stand for the picture (arXiv 2405.19315).

From spec abstractive 5. A resampler takes the projector's place: learned queries attend once to the
tower's patches, and the first m of them are the picture at budget m. Training draws m for every
step, so one model serves every budget. Decisions of the register: the keys are positions only, as
released (M1), which makes the attention the same for every picture. Ports to towers without CLIP's
raster resize the table of positions to the picture's raster; the queries show no place, so their
positions count on like learned tokens', and nothing is added to them by DeepStack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etcbench.compressor import Compressor, ModelSpec
from etcbench.costs import Case
from etcbench.errors import BudgetError, UsageError
from etcbench.grids import require_one_raster
from etcbench.options import require_positive
from etcbench.released import LLAVA_LANGUAGE, LLAVA_TOWER, PROJECTOR, TOWER, KeyMap
from etcbench.states import Questions, Resampled, VisionStates

QUERIES = 256  # of the released model, where a picture has 576 patches
ALL = "all"


@dataclass(eq=False)
class MQT(Compressor):
    """The first ``tokens`` of nested queries.

    Parameters
    ----------
    queries : int, optional
        Queries of the model, a square number; default 256, on a backbone with a small fixed raster
        the square of two thirds of its side.
    heads : int
        Heads of the attention.
    keys : {"position", "content"}
        What the keys are made of: positions only, or positions and features.
    draw : {"even", "any"}
        What a training step draws m from: even numbers up to all queries, or any number. In a
        training stage of phase ``all`` (the released model's first) m is always all.
    """

    trained: ClassVar[bool] = True
    any_budget: ClassVar[bool] = True
    resamples: ClassVar[bool] = True
    released: ClassVar[KeyMap] = KeyMap(
        {
            **LLAVA_LANGUAGE,
            **LLAVA_TOWER,
            "model.query_abstractor.*": "compressor.*",
        },
        optional=(TOWER,),
        unused=(PROJECTOR,),
    )

    queries: int | None = None
    heads: int = 16
    keys: Literal["position", "content"] = "position"
    draw: Literal["even", "any"] = "even"

    def prepare(self, spec: ModelSpec) -> None:
        """Create the resampler; check budget and options."""
        require_one_raster(self.name(), spec)
        assert self.budget is not None
        if self.queries is None:
            sides = () if spec.grid is None else tuple(math.ceil(s * 2 / 3) for s in spec.grid)
            self.queries = min([QUERIES, *(side * side for side in sides)])
        require_positive("mqt-llava", queries=self.queries, heads=self.heads)
        if math.isqrt(self.queries) ** 2 != self.queries:
            raise UsageError(f"mqt-llava: queries stand on a square, and {self.queries} is none")
        if self.budget.tokens > self.queries:
            raise BudgetError(
                f"mqt-llava has {self.queries} queries on {spec.name}, so it cannot make "
                f"{self.budget.tokens} tokens; ask for 1 to {self.queries}"
            )
        if spec.feature_width % self.heads:
            raise UsageError(
                f"mqt-llava: {self.heads} heads do not divide the {spec.feature_width} features "
                f"of {spec.name}; say heads="
            )
        self.phase: str | None = None
        self.resampler = Resampler(self, spec).eval()

    @property
    def module(self) -> nn.Module:
        """The resampler."""
        return self.resampler

    def schedule(self, visual_tokens: int, layers: int) -> list[int]:
        """Every layer holds m tokens."""
        assert self.budget is not None
        return [self.budget.tokens] * layers

    def own_macs(self, case: Case) -> int:
        """Count projections of queries and patches, and their attention."""
        made, patches, width = case.entered[0], case.visual, case.spec.feature_width
        each = made * (2 * width + case.spec.hidden) + patches * 2 * (width + made)
        return width * (each + patches * width * (self.keys == "content"))

    def resample(self, vision: VisionStates, questions: Questions) -> Resampled:
        """Let the first queries look at the picture."""
        assert self.budget is not None
        tokens = self.drawn() if self.resampler.training else self.budget.tokens
        features, present = vision.patches
        return Resampled(self.resampler(features, present, vision.grid, tokens), lead=tokens)

    def objective(self, model: Any, batch: Any) -> None:
        """Note the phase; the loss is that of the answers."""
        if model.phase not in (None, ALL):
            raise UsageError(f"mqt-llava: there is no phase {model.phase!r}; only {ALL!r}, or none")
        self.phase = model.phase

    def drawn(self) -> int:
        """How many queries the present training step uses (spec abstractive 5.2)."""
        assert self.queries is not None
        if self.phase == ALL:
            return self.queries
        step = 2 if self.draw == "even" else 1
        draws = max(self.queries // step, 1)
        return min(step * (1 + int(torch.randint(draws, ()))), self.queries)


class Resampler(nn.Module):
    """One cross-attention of queries to patches, and a linear map to the decoder's width.

    No residual, no feed-forward part, no norm behind it; queries do not see each other, so the
    first m outputs do not depend on how many queries there are.
    """

    def __init__(self, method: MQT, spec: ModelSpec) -> None:
        super().__init__()
        assert method.queries is not None
        width = spec.feature_width
        self.query = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(method.queries, width), std=0.02)
        )
        self.pos_embed = nn.Parameter(sine_cosine(math.isqrt(method.queries), width))
        self.attn = nn.MultiheadAttention(width, method.heads, batch_first=True)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.randn(width, spec.hidden) * spec.hidden**-0.5)
        self.content = nn.Linear(width, width) if method.keys == "content" else None

    def forward(self, features: Tensor, present: Tensor, grid: Tensor, tokens: int) -> Tensor:
        """Resample pictures to ``tokens`` tokens, shape (pictures, tokens, hidden).

        ``features`` (pictures, patches, width) are in raster order, ``present`` says which are no
        padding, ``grid`` (pictures, 2) which raster they are of.
        """
        features = features.to(self.proj.dtype)
        keys = torch.zeros_like(features)
        for shape in set(map(tuple, grid.tolist())):
            same = (grid == grid.new_tensor(shape)).all(-1)
            keys[same, : shape[0] * shape[1]] = self.positions(shape).to(keys)
        if self.content is not None:
            keys = keys + self.content(features)
        query = self.ln_q(self.query[:tokens] + self.pos_embed[:tokens])
        out, _ = self.attn(
            query.expand(len(features), -1, -1), self.ln_k(keys), self.ln_v(features),
            key_padding_mask=None if bool(present.all()) else ~present, need_weights=False,
        )  # fmt: skip
        return out @ self.proj

    def positions(self, raster: tuple[int, int]) -> Tensor:
        """Resize the table of positions to a raster; shape (patches, width)."""
        side = math.isqrt(len(self.pos_embed))
        if raster == (side, side):
            return self.pos_embed
        table = self.pos_embed.float().unflatten(0, (side, side)).permute(2, 0, 1)
        resized = F.interpolate(table[None], raster, mode="bicubic", align_corners=False)
        return resized[0].flatten(1).T


def sine_cosine(side: int, width: int) -> Tensor:
    """Table of 2-D positions on a square, shape (side * side, width).

    The first half of the channels encodes the column, the second the row; each half has sines,
    then cosines, of frequencies falling from 1 to 1/10000.
    """
    quarter = width // 4
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    one = torch.cat([angle.sin(), angle.cos()], -1)
    column, row = one.expand(side, -1, -1), one[:, None].expand(-1, side, -1)
    table = torch.cat([column, row], -1).flatten(0, 1).float()
    return F.pad(table, (0, width - 4 * quarter))


METHOD = MQT
