"""SparseVLM: the question's own words vote, stage by stage, which visual tokens stay.

From spec selective 3, versions 1.0, 1.5 and 2.0 ("+"). Training-free. Decisions of its register:
published budgets are reproduced by their lists, whose layer average is above the budget's name
(11.3; 192 means 206.5), other budgets by `etcbench.stages` at the true average; merging is the
mean of Euclidean clusters, as in the code (11.4; the paper's sum is an option); version 2.0
averages 14 heads on LLaVA, half of them elsewhere, and its positional weights have a floor (11.5).

A stage drops at least one token and leaves one. Raters are the text tokens above the mean by more
than rounding; without any, all text votes. Version 1.0 counts by the rank of the votes times the
picture's tokens over 576; it serves 1/3, 2/9 and 1/9 of them, and its `schedule` is an estimate.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from etcbench.compressor import DecodePositions, ModelSpec, Numbering, top_mask
from etcbench.costs import Case
from etcbench.errors import BudgetError, UsageError
from etcbench.merging import Terms, dpc_knn, equal_rows, merge
from etcbench.selection import Kind, Layout, Selection
from etcbench.stages import TOKENS, Left, Staged, Stages, kept_and_merged, kept_of, recycled
from etcbench.states import LayerState

LOG = logging.getLogger(__name__)
LISTS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
LISTS_2 = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
RANK_RULES = {192: (13.5, 0), 128: (9, 6), 64: (0.8, 0)}  # scale and bias of version 1.0
FLOOR = 0.1  # of the rotary response; it is above 1.1 up to a distance of 700 on LLaVA


@dataclass(eq=False)
class SparseVLM(Staged):
    """Drop by the votes of rater tokens behind layers 2, 6, 15; version 1 recycles some.

    Parameters
    ----------
    version : {"1.5", "2.0", "1.0"}
        1.5: fixed lists and recycling. 2.0: no recycling, selected heads, votes corrected for
        position, positions kept. 1.0: counts by the rank of the votes, recycling, a fourth stage.
    heads : int, optional
        Heads that vote in version 2.0; default 14 on LLaVA models that have so many, else half.
    merging : {"mean", "sum"}
        A cluster's mean, joined by distance (as the code); its sum, by cosine (as the paper).
    seed : int
        Of the noise that breaks ties in clustering.
    """

    version: Literal["1.5", "2.0", "1.0"] = "1.5"
    heads: int | None = None
    merging: Literal["mean", "sum"] = "mean"
    seed: int = 0

    def prepare(self, spec: ModelSpec) -> None:
        """Check options and budget."""
        half = max(spec.heads // 2, 1)
        usual = 14 if spec.family.startswith("llava") and spec.heads > 14 else half
        self.voting = usual if self.heads is None else self.heads
        if not 1 <= self.voting <= spec.heads:
            raise UsageError(f"sparsevlm: heads must be 1 to {spec.heads} on {spec.name}")
        super().prepare(spec)
        total = None if self.budget is None else self.budget.checked_at(spec)
        if self.version == "1.0" and self.budget is not None and total is not None:
            served = [*(round(n * total / TOKENS) for n in reversed(RANK_RULES)), total]
            if self.budget.at(total).tokens not in served or self.budget.counted == "kept":
                rules = ", ".join(self.budget.alike(tokens, total) for tokens in served)
                raise BudgetError(f"sparsevlm 1.0 on {spec.name} serves {rules}, not {self.budget}")

    @property
    def published(self) -> tuple[Stages, ...]:
        """Lists of section 3.4, by first short layer."""
        if self.version == "2.0":
            return tuple(Stages(n, (3, 7, 16), counts) for n, counts in LISTS_2.items())
        if self.version == "1.5":
            return tuple(Stages(n, (3, 7, 16), counts) for n, counts in LISTS.items())
        return tuple(Stages(n, (3, 7, 16, 20), (*LISTS[n], LISTS[n][-1])) for n in RANK_RULES)

    @property
    def left(self) -> Left:
        """What was kept, and in version 1 the merged tokens."""
        return kept_of if self.version == "2.0" else kept_and_merged

    @property
    def numbering(self) -> Numbering:
        """Version 2.0 keeps positions."""
        return "keep" if self.version == "2.0" and self.positions == "auto" else super().numbering

    @property
    def decode_positions(self) -> DecodePositions:
        """Behind what each layer holds."""
        return "layer"

    def own_macs(self, case: Case) -> int:
        """Count the likeness of picture and text, then the raters' rows at each stage."""
        likeness = case.prompt(case.visual) * case.after * case.spec.hidden
        return likeness + super().own_macs(case)

    def stage_macs(self, case: Case, layer: int) -> int:
        """Count the rows of the raters; in version 2.0 also what their positions alone favour."""
        length = case.length(layer)
        response = case.marked * length * 2 * case.spec.head_dim * (self.version == "2.0")
        return case.score_rows(case.marked, length) + response

    def mark(self, embeds: Tensor, layout: Layout) -> Tensor:
        """Choose the raters: text behind the picture that the picture resembles (3.2)."""
        visual = layout.is_kind(Kind.VISUAL)
        text = layout.is_kind(Kind.SUFFIX)
        words = Selection.from_mask(text)
        likeness = embeds.float() @ words.gather(embeds.float()).transpose(-1, -2)
        padding = (words.index < 0)[:, None]
        shares = likeness.masked_fill(padding, -torch.inf).softmax(-1).nan_to_num()
        received = (shares * visual[..., None]).sum(1)
        mean = received.sum(-1, keepdim=True) / text.sum(-1, keepdim=True).clamp_min(1)
        above = torch.zeros_like(text)
        above[text] = (received > mean * (1 + 1e-6))[words.index >= 0]
        return torch.where(above.any(-1, keepdim=True), above, text)

    def select_hidden(self, state: LayerState) -> Selection | None:
        """Keep the best voted tokens; in version 1 append clusters of the best dropped ones."""
        wanted = self.wanted(state)
        if wanted is None:
            return None
        assert state.marks is not None
        visual = state.layout.is_kind(Kind.VISUAL)
        votes = self._votes(state, state.marks, visual)
        if self.version == "1.0":
            wanted = self._ranked(state, state.marks, wanted, votes)
        counts = [
            n if count is None else kept_of(n, count)
            for count, n in zip(wanted, visual.sum(-1).tolist(), strict=True)
        ]
        scores = votes.sum(1) / state.marks.sum(-1, keepdim=True).clamp_min(1)
        kept = top_mask(scores, visual, torch.tensor(counts, device=visual.device))
        others = state.layout.valid & ~visual
        if self.version == "2.0":
            return Selection.from_mask(others | kept)
        return self._recycled(state, scores, others | kept, visual & ~kept)

    def _votes(self, state: LayerState, marks: Tensor, visual: Tensor) -> Tensor:
        """Attention from raters, mean of heads: fp32, (batch, raters, tokens), zero for padding."""
        raters = Selection.from_mask(marks).index
        rows = raters.clamp_min(0)
        weights = state.attention.weights(rows).float() * (raters >= 0)[:, None, :, None]
        if self.version != "2.0":
            return weights.mean(1)
        response = state.attention.rotary_response(rows)
        if ((response < FLOOR) & visual[:, None]).any():
            LOG.info("a positional weight is below its floor of %s", FLOOR)
        weights = weights / response[:, None].clamp_min(FLOOR)
        strength = (weights * visual[:, None, None]).sum((2, 3))
        chosen = top_mask(strength, torch.ones_like(strength, dtype=torch.bool), self.voting)
        return (weights * chosen[:, :, None, None]).sum(1) / self.voting

    def _ranked(
        self, state: LayerState, marks: Tensor, wanted: list[int | None], votes: Tensor
    ) -> list[int | None]:
        """Count for version 1.0: scale * rank of the raters' attention + bias (3.4)."""
        assert self.budget is not None
        visual, found = state.layout.is_kind(Kind.VISUAL), list(wanted)
        for row, (tokens, pictures) in enumerate(state.original_counts()):
            if wanted[row] is not None:
                share = self.budget.at(tokens, pictures).tokens / tokens
                scale, bias = RANK_RULES[min(RANK_RULES, key=lambda n: abs(n / TOKENS - share))]
                seen = votes[row, : int(marks[row].sum())][:, visual[row]]
                count = scale * int(torch.linalg.matrix_rank(seen)) + bias
                found[row] = int(count * tokens / TOKENS)
        return found

    def _recycled(
        self, state: LayerState, scores: Tensor, keep: Tensor, dropped: Tensor
    ) -> Selection:
        """Merge clusters of the best dropped tokens and place them behind the kept ones (3.5)."""
        counts = [recycled(n)[0] if n else 0 for n in dropped.sum(-1).tolist()]
        candidates = top_mask(scores, dropped, torch.tensor(counts, device=keep.device))
        own, centre = torch.ones_like(scores), torch.zeros_like(keep)
        terms: list[Terms] = []
        for rows, index in equal_rows(candidates):
            row = rows[:, None].expand_as(index)
            hidden, count = state.hidden[row, index], index.shape[1] // 10 + 1
            centres, label = dpc_knn(hidden, count, self.seed, cosine=self.merging == "sum")
            size = torch.zeros_like(centres).scatter_add(1, label, torch.ones_like(label))
            share = size.float().reciprocal() if self.merging == "mean" else (size > 0).float()
            place = index.gather(1, centres)
            centre[rows[:, None], place] = True
            own[rows[:, None], place] = share
            target, weight = place.gather(1, label), share.gather(1, label)
            other = target != index
            terms.append((row[other], index[other], target[other], weight[other]))
        later = centre.byte() + 2 * state.layout.is_kind(Kind.SUFFIX).byte()
        return merge(keep | centre, terms, own, later)


METHOD = SparseVLM
