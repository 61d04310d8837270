"""TwigVLM: a small trained branch says which visual tokens an answer needs, and drafts answers.

From spec selective 7. Behind the first K layers of a frozen model a twig of T layers of the same
kind, with a norm and head of its own, runs on the whole sequence. Its last layer's attention ranks
the visual tokens: the best R stay for layers K to K_f - 1, none from K_f on (FinalWipe). The twig
also drafts the answer, which the pruned model verifies (7.5): the text is that of greedy decoding.

Decisions of its register: the last prompt token votes (11.13); K = 2, T = 3, K_f = 3/4 of the depth
(11.14). Fewer than 24 layers take K and T in the same proportion, at least 1. A budget does not
count the twig's own layers (7.3); `own_macs` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from etcbench.branch import Branch, Chain, Speculation
from etcbench.compressor import Compressor, ModelSpec, Reuse, top_mask
from etcbench.costs import Case
from etcbench.errors import BudgetError, UsageError
from etcbench.released import KeyMap
from etcbench.selection import Kind, Selection
from etcbench.stages import DEEP, LAYERS
from etcbench.states import LayerState

RELEASED: dict[str, str | None] = {
    "model.layers.*": "compressor.twig.layers.*",
    "model.norm.weight": "compressor.twig.norm.weight",
    "lm_head.weight": "compressor.twig.head.weight",
}


@dataclass(eq=False)
class TwigVLM(Compressor):
    """Rank by the twig's attention behind layer ``layer - 1``; wipe in front of ``wipe_layer``.

    Parameters
    ----------
    layer : int, optional
        K: layers of the model that the twig stands on.
    depth : int, optional
        T: layers of the twig.
    wipe_layer : int, optional
        K_f: first layer without visual tokens; the depth of the decoder for none (no FinalWipe).
    query : {"last", "text"}
        Rows of the attention map that vote: the last prompt token (as the code) or all text
        behind the picture (as the paper's equation).
    decoding : {"speculative", "greedy"}
        Whether the twig drafts; the answers are the same.
    draft_length, confidence : int, float
        delta and theta of 7.5.
    """

    query_aware: ClassVar[bool] = True
    trained: ClassVar[bool] = True
    any_budget: ClassVar[bool] = True
    released: ClassVar[KeyMap | None] = KeyMap(RELEASED, unused=("model.",))

    layer: int | None = None
    depth: int | None = None
    wipe_layer: int | None = None
    query: Literal["last", "text"] = "last"
    decoding: Literal["speculative", "greedy"] = "speculative"
    draft_length: int = 5
    confidence: float = 0.6

    def prepare(self, spec: ModelSpec) -> None:
        """Settle K, T and K_f; check that the layers in front leave room for the budget."""
        name, self.layers = self.name(), spec.layers
        share = 1.0 if spec.layers >= DEEP else spec.layers / LAYERS
        self.first = max(round(2 * share), 1) if self.layer is None else self.layer
        grown = max(round(3 * share), 1) if self.depth is None else self.depth
        self.wiped = round(0.75 * spec.layers) if self.wipe_layer is None else self.wipe_layer
        if not (self.first >= 1 and grown >= 1 and self.first + grown <= spec.layers):
            raise UsageError(f"{name}: layer + depth must be 2 to {spec.layers} on {spec.name}")
        if not self.first < self.wiped <= spec.layers:
            most = f"{spec.layers} on {spec.name}"
            raise UsageError(f"{name}: wipe_layer must be {self.first + 1} to {most}")
        if self.draft_length < 1 or not 0 <= self.confidence <= 1:
            raise UsageError(f"{name}: draft_length is at least 1 and confidence a probability")
        self.parts, self.grown = nn.ModuleDict(), grown
        self._check_budget(spec)

    def _check_budget(self, spec: ModelSpec) -> None:
        assert self.budget is not None
        budget, total = self.budget, self.budget.checked_at(spec)
        if total is None or budget.counted == "kept" or budget.of(total) == total:
            return
        if not 1 <= self.kept_at(budget.of(total), total) <= total:
            served = self.first * total // spec.layers + 1, self.wiped * total // spec.layers, total
            least, most, full = (budget.alike(tokens, total) for tokens in served)
            raise BudgetError(
                f"{self.name()}: with all {total} tokens in {self.first} and none in "
                f"{spec.layers - self.wiped} of {spec.layers} layers of {spec.name} the average "
                f"cannot be {budget}; it can serve {least} to {most}, {full}, or "
                "kept:1 and up"
            )

    def attach(self, backbone: Any) -> None:
        """Grow the twig as a copy of the layers K to K + T - 1, final norm and head (7.1)."""
        if "twig" not in self.parts:
            self.parts["twig"] = backbone.branch(self.first, self.grown)

    @property
    def module(self) -> nn.Module:
        """The twig."""
        return self.parts

    @property
    def branch(self) -> Branch:
        """The twig."""
        return cast(Branch, self.parts["twig"])

    @property
    def speculation(self) -> Speculation | None:
        """Drafts of one sequence (7.5)."""
        drafts = self.decoding == "speculative"
        return Chain(self.draft_length, self.confidence) if drafts else None

    @property
    def reuse(self) -> Reuse:
        """The layers under the twig, and the twig."""
        return "layers"

    @property
    def shared_layers(self) -> int:
        """Layers under the twig."""
        return self.first

    def kept_at(self, average: float, visual_tokens: int) -> int:
        """R = ceil((L * average - K * M) / (K_f - K)) (7.3), unbounded."""
        total = self.layers * average - self.first * visual_tokens
        return ceil(total / (self.wiped - self.first))

    def counts(self, visual_tokens: int, pictures: int = 1) -> tuple[int, int]:
        """Tokens left by the twig, and by FinalWipe; a budget of all tokens leaves all of them."""
        assert self.budget is not None
        tokens = self.budget.at(visual_tokens, pictures).tokens
        if tokens >= visual_tokens:
            return visual_tokens, visual_tokens
        kept = tokens if self.budget.counted == "kept" else self.kept_at(tokens, visual_tokens)
        return min(max(kept, 1), visual_tokens), 0

    def schedule(self, visual_tokens: int, layers: int) -> list[int]:
        """All tokens in layers 0..K-1, R up to K_f - 1, then none."""
        kept, left = self.counts(visual_tokens)
        last = [kept] * (self.wiped - self.first) + [left] * (layers - self.wiped)
        return [visual_tokens] * self.first + last

    def own_macs(self, case: Case) -> int:
        """Count the twig, whose last layer gives only keys where it does not draft; the ranking."""
        length = case.length(self.first - 1)
        run = case.decoder_layer(length - case.shared, length)
        return (self.grown - (self.speculation is None)) * run + self.score_macs(case, length)

    def score_macs(self, case: Case, length: int) -> int:
        """Count the ranking."""
        return case.score_rows(1 if self.query == "last" else length, length, length)

    def select_hidden(self, state: LayerState) -> Selection | None:
        """Keep the R best visual tokens behind layer K - 1 and none behind layer K_f - 1."""
        visual = state.layout.is_kind(Kind.VISUAL)
        step = {self.first: 0, self.wiped: 1}.get(state.layer + 1)
        if step is None or not visual.any():
            return None
        counts = [self.counts(*row)[step] for row in state.original_counts()]
        limit = torch.tensor(counts, device=visual.device)
        chosen = top_mask(visual.float() if step else self.scores(state), visual, limit)
        return Selection.from_mask((state.layout.valid & ~visual) | chosen)

    def scores(self, state: LayerState) -> Tensor:
        """Attention of the last twig layer, mean of the heads, shape (batch, tokens) (7.2)."""
        assert state.branch is not None
        if self.query == "last":
            return state.branch.weights(state.layout.last_valid()[:, None]).mean(1)[:, 0]
        order = torch.arange(state.layout.tokens, device=state.hidden.device)
        weights = state.branch.weights(order.expand(state.layout.batch, -1)).mean(1)
        text = state.layout.is_kind(Kind.SUFFIX)[..., None]
        return (weights * text).sum(1) / text.sum(1).clamp_min(1)

    def objective(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """Next-token prediction by the twig on a frozen model (7.7)."""
        grown = self.grow(model, model.frozen(batch, self.first))
        logits = self.branch.logits(model.answer_states(grown, batch))
        return dict(model.answer_loss(logits, batch))

    def grow(self, model: Any, states: Any, start: int = 0, stop: int | None = None) -> Any:
        """Run layers of the twig in training; the states are those of the model's layer K - 1."""
        stop = self.grown if stop is None else stop
        return model.decoder.run(states, None, start, stop, False, blocks=self.branch.layers)


METHOD = TwigVLM
