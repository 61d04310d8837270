"""FastV: after K layers keep the visual tokens that the last prompt token attends to most.

From spec selective 2. Decisions of its register: last prompt token as the query (11.1), K = 2
(11.2), tokens chosen once at prefill and frozen (2.4 variant 3), original positions kept (2.5).
Training-free. Variant 1 (masking) gives the same answers at full cost and variant 2 (choosing anew
for each generated token) is of no use here (1.8): neither is an option.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from etcbench.compressor import Compressor, ModelSpec, Reuse, top_mask
from etcbench.costs import Case
from etcbench.errors import BudgetError, UsageError
from etcbench.selection import Kind, Selection
from etcbench.states import LayerState


@dataclass(eq=False)
class FastV(Compressor):
    """Rank by attention received at layer ``layer - 1``, drop before layer ``layer``.

    Parameters
    ----------
    layer : int
        K: number of layers that see every visual token.
    query : {"last", "all"}
        Rows of the attention map that vote: the last prompt token (as the code) or all tokens
        (as the paper's text).
    ratio : float, optional
        R: share of the visual tokens that is dropped (2.3), in place of a budget; the paper's
        setting is layer 2, ratio 0.5.
    """

    query_aware: ClassVar[bool] = True

    layer: int = 2
    query: Literal["last", "all"] = "last"
    ratio: float | None = None

    @classmethod
    def budget_in(cls, options: dict[str, Any]) -> bool:
        """Whether the ratio says how many are kept."""
        return options.get("ratio") is not None

    def prepare(self, spec: ModelSpec) -> None:
        """Check that layers 0..K-1 alone do not exceed the budget."""
        if not 1 <= self.layer < spec.layers:
            raise UsageError(f"fastv: layer must be 1 to {spec.layers - 1} on {spec.name}")
        if self.query not in ("last", "all"):
            raise UsageError(f"fastv: query must be 'last' or 'all', not {self.query!r}")
        self.layers = spec.layers
        if self.ratio is not None:
            if self.budget is not None:
                raise UsageError("fastv: ratio fixes the count; leave out --tokens")
            if not 0 <= self.ratio < 1:
                raise UsageError(f"fastv: ratio is a share dropped, 0 up to 1, not {self.ratio}")
            return
        assert self.budget is not None
        total = self.budget.checked_at(spec)
        if total is None or self.budget.counted == "kept":
            return
        if self._solved(self.budget.of(total), total) < 1:
            least = next(n for n in range(1, total + 1) if self._solved(n, total) >= 1)
            served = (self.budget.alike(tokens, total) for tokens in (least, total))
            raise BudgetError(
                f"fastv: {total} tokens in {self.layer} of {spec.layers} layers of {spec.name} "
                f"already exceed an average of {self.budget}; it can serve {' to '.join(served)}, "
                "or kept:1 and up"
            )

    @property
    def reuse(self) -> Reuse:
        """The layers in front of the drop."""
        return "layers"

    @property
    def shared_layers(self) -> int:
        """Layers below the drop do not depend on the question."""
        return self.layer

    def _solved(self, average: int, visual_tokens: int) -> int:
        """R = (L * average - K * M) / (L - K) (spec 1.3), unbounded."""
        total = self.layers * average - self.layer * visual_tokens
        return round(total / (self.layers - self.layer))

    def kept(self, visual_tokens: int, pictures: int = 1) -> int:
        """Tokens left of ``visual_tokens``, at least one of them."""
        if self.ratio is not None:
            return max(round(visual_tokens * (1 - self.ratio)), 1)
        assert self.budget is not None
        tokens = self.budget.at(visual_tokens, pictures).tokens
        if self.budget.counted == "kept":
            return min(tokens, visual_tokens)
        return min(max(self._solved(tokens, visual_tokens), 1), visual_tokens)

    def schedule(self, visual_tokens: int, layers: int) -> list[int]:
        """All tokens in layers 0..K-1, R tokens from layer K on."""
        kept = self.kept(visual_tokens)
        return [visual_tokens] * self.layer + [kept] * (layers - self.layer)

    def own_macs(self, case: Case) -> int:
        """Count the attention rows that vote."""
        length = case.length(self.layer - 1)
        return case.score_rows(1 if self.query == "last" else length, length)

    def select_hidden(self, state: LayerState) -> Selection | None:
        """Keep the R best visual tokens and all text, in order."""
        if state.layer != self.layer - 1:
            return None
        visual = state.layout.is_kind(Kind.VISUAL)
        if not visual.any():
            return None
        if self.query == "last":
            rows = state.layout.last_valid()[:, None]
        else:
            rows = torch.arange(state.layout.tokens, device=visual.device).expand_as(visual)
        weights = state.attention.weights(rows).mean(1)
        valid_rows = state.layout.valid.gather(1, rows)[..., None]
        scores = (weights * valid_rows).sum(1) / valid_rows.sum(1)
        counts = [self.kept(*row) for row in state.original_counts()]
        keep = torch.tensor(counts, device=visual.device)
        chosen = top_mask(scores, visual, keep)
        return Selection.from_mask((state.layout.valid & ~visual) | chosen)


METHOD = FastV
