"""PyramidDrop: at the end of each stage keep the visual tokens the last instruction token prefers.

From spec selective 5. Decisions of its register: the stage's output is scored with the projections
of the *next* layer, softmax over the whole row (11.10, as the code; the paper's rule is an option);
training-free. Positions are renumbered at each stage and every layer decodes behind what it holds
itself (5.3).

Budgets (5.4): the authors' own setting is 8/16/24 with half of the tokens kept each time, an
average of 270 of 576. Lists for 192, 128 and 64 (2/6/16) are unofficial: they come from a follow-up
work. Other budgets and shapes follow `etcbench.stages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from etcbench.compressor import DecodePositions, ModelSpec, top_mask
from etcbench.costs import Case
from etcbench.errors import UsageError
from etcbench.selection import Kind, Selection
from etcbench.stages import Staged, Stages, check_layers, numbers
from etcbench.states import LayerState

OFFICIAL = Stages(270, (8, 16, 24), (288, 144, 72))
UNOFFICIAL = (
    Stages(192, (2, 6, 16), (300, 200, 110)),
    Stages(128, (2, 6, 16), (303, 110, 36)),
    Stages(64, (2, 6, 16), (66, 30, 17)),
)


@dataclass(eq=False)
class PyramidDrop(Staged):
    """Drop visual tokens at the end of each of several stages, most of them late.

    Parameters
    ----------
    layers : str, optional
        Layers in front of which tokens are dropped, e.g. ``"8-16-24"``.
    ratios : str, optional
        Share of the *original* tokens that each drop keeps, e.g. ``"0.5-0.25-0.125"``; with
        `layers`, in place of a budget.
    score : {"next", "last"}
        Whose queries and keys score a stage's end: the next layer's, on the stage's output, by
        attention (as the code); the stage's last layer's own, by their scaled products (as the
        paper).
    """

    layers: str | None = None
    ratios: str | None = None
    score: Literal["next", "last"] = "next"

    @classmethod
    def budget_in(cls, options: dict[str, Any]) -> bool:
        """Whether layers and ratios are listed."""
        return options.get("layers") is not None and options.get("ratios") is not None

    def prepare(self, spec: ModelSpec) -> None:
        """Read the lists; check the budget."""
        if (self.layers is None) != (self.ratios is None):
            raise UsageError("pdrop: layers and ratios are given together")
        if self.layers is not None and self.budget is not None:
            raise UsageError("pdrop: layers and ratios fix the counts; leave out --tokens")
        self.shares = numbers(self.ratios, float, "pdrop: ratios")
        check_layers(self.places, spec, "pdrop")
        decreasing = list(self.shares) == sorted(self.shares, reverse=True)
        if len(self.places) != len(self.shares) or not decreasing:
            raise UsageError("pdrop: ratios are one per layer and do not grow")
        if not all(0 < share <= 1 for share in self.shares):
            raise UsageError("pdrop: ratios are above 0 and at most 1")
        super().prepare(spec)

    @property
    def places(self) -> tuple[int, ...]:
        """First short layers of the options."""
        return numbers(self.layers, int, "pdrop: layers")

    @property
    def published(self) -> tuple[Stages, ...]:
        """The official setting and the unofficial ones."""
        return (OFFICIAL, *UNOFFICIAL)

    @property
    def decode_positions(self) -> DecodePositions:
        """Behind what each layer holds."""
        return "layer"

    def stages(self, visual_tokens: int, pictures: int = 1) -> Stages:
        """Stages of the options, or for the budget."""
        if not self.places:
            return super().stages(visual_tokens, pictures)
        counts = tuple(max(int(share * visual_tokens), 1) for share in self.shares)
        return Stages(0, self.places, counts)

    def stage_macs(self, case: Case, layer: int) -> int:
        """Count one row, and for the next layer the projections of all keys."""
        length = case.length(layer)
        return case.score_rows(1, length, keys_of=length if self.score == "next" else 0)

    def select_hidden(self, state: LayerState) -> Selection | None:
        """Keep the best visual tokens and all text, in order."""
        wanted = self.wanted(state)
        if wanted is None:
            return None
        visual = state.layout.is_kind(Kind.VISUAL)
        row = state.layout.last_valid().clamp_min(0)[:, None]
        if self.score == "next":
            scores = state.next_attention.weights(row).mean(1)[:, 0]
        else:
            scores = state.attention.logits(row).mean(1)[:, 0]
        kept = top_mask(scores, visual, self.limits(wanted, visual))
        return Selection.from_mask((state.layout.valid & ~visual) | kept)


METHOD = PyramidDrop
