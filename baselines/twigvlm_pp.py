"""TwigVLM++: a pruning head of its own for the twig, trained by reward, and drafts that are trees.

From spec selective 7.6 to 7.8. Gates on the queries and keys of the last twig layer turn its
attention into a distribution over the visual tokens, trained in two phases: ``distill`` (the
answers; the model's own predictions; a late layer's attention) and ``reinforce`` (how probable the
reference answer is under the model pruned to a drawn set; gates only).

Decisions of its register: the attention term stays out of the second phase unless
`reinforced_attention` asks for it (11.15); the last prompt token is the query in both phases, as at
inference (11.16). The key gate has the keys' width under GQA (7.6). Every draft tree is verified
through all layers, the shared ones included, as in the released code (7.8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from etcbench.baselines.twigvlm import RELEASED, TwigVLM
from torch import Tensor

from etcbench.branch import Speculation, Tree
from etcbench.compressor import ModelSpec
from etcbench.costs import Case
from etcbench.errors import UsageError
from etcbench.released import KeyMap
from etcbench.selection import Kind
from etcbench.stages import LAYERS, TOKENS
from etcbench.states import LayerState
from etcbench.twig import PruningHead, visual_places
from etcbench.twig_training import TwigTraining

TEACHER = 19  # of 32 layers
BUDGETS = tuple(64 + 128 * step / 6 for step in range(7))  # of 576 tokens
GATES: dict[str, str | None] = {
    "leaf_attention_module.q_gate.weight": "compressor.pruning_head.query.weight",
    "leaf_attention_module.k_gate.weight": "compressor.pruning_head.key.weight",
}


@dataclass(eq=False)
class TwigVLMPlus(TwigVLM):
    """Rank by the pruning head's distribution; draft trees of 10 x 4, verify 60 nodes.

    Parameters
    ----------
    drafts : {"tree", "chain"}
        Whether the twig drafts a tree, or one sequence as TwigVLM's does (7.5), which costs less
        where a pass over many tokens costs more than over one, as on a CPU.
    width, children, tree_depth, nodes : int
        E, K_top, D and N_max of the draft tree (7.8).
    teacher_layer : int, optional
        Whose attention the pruning head learns; default 19 of 32, in proportion.
    prediction_weight, attention_weight : float
        Of L_pred and L_attn in the first phase (7.7).
    rollouts : int
        G: sets drawn for each question in the second phase.
    reinforced_attention : float
        Weight of L_attn in the second phase, times gamma squared as in the released code; gamma
        grows from 1 to 2 with the number of tokens kept.
    """

    released: ClassVar[KeyMap | None] = KeyMap({**RELEASED, **GATES}, unused=("model.",))

    drafts: Literal["tree", "chain"] = "tree"
    width: int = 10
    children: int = 10
    tree_depth: int = 4
    nodes: int = 60
    teacher_layer: int | None = None
    prediction_weight: float = 0.1
    attention_weight: float = 1.0
    rollouts: int = 32
    reinforced_attention: float = 0.0

    def prepare(self, spec: ModelSpec) -> None:
        """Settle the layers and build the pruning head."""
        super().prepare(spec)
        default = round(TEACHER * spec.layers / LAYERS)
        self.teacher = default if self.teacher_layer is None else self.teacher_layer
        if not self.first <= self.teacher < spec.layers:
            raise UsageError(
                f"twigvlm-pp: teacher_layer must be {self.first} to {spec.layers - 1} on "
                f"{spec.name}"
            )
        if self.query != "last":
            raise UsageError("twigvlm-pp: the pruning head has one query, the last prompt token")
        if min(self.width, self.children, self.tree_depth, self.nodes) < 1 or self.rollouts < 2:
            raise UsageError("twigvlm-pp: a tree has at least 1 of each, a group 2 rollouts")
        self.parts["pruning_head"] = PruningHead(spec)

    def attach(self, backbone: Any) -> None:
        """Grow the twig; the head computes in its precision."""
        super().attach(backbone)
        self.parts["pruning_head"].to(backbone.dtype)

    @property
    def speculation(self) -> Speculation | None:
        """Drafts that are trees (7.8), unless a chain is asked for."""
        if self.decoding == "greedy" or self.drafts == "chain":
            return super().speculation
        return Tree(self.width, self.children, self.tree_depth, self.nodes)

    def score_macs(self, case: Case, length: int) -> int:
        """Count the gated row over the visual tokens and the two gates."""
        spec = case.spec
        gates = spec.heads + case.visual * spec.kv_heads
        return case.score_rows(1, case.visual, length) + gates * spec.hidden * spec.head_dim

    def scores(self, state: LayerState) -> Tensor:
        """Share of each visual token in the pruning head's distribution, (batch, tokens)."""
        assert state.branch is not None
        row = state.layout.last_valid()[:, None]
        shares = self.parts["pruning_head"](state.branch, row, state.layout)[:, 0]
        scores = torch.zeros(state.layout.kind.shape, device=shares.device)
        scores[state.layout.is_kind(Kind.VISUAL)] = shares[visual_places(state.layout) >= 0]
        return scores

    def objective(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """Loss of the phase, ``distill`` (default) or ``reinforce`` (7.7)."""
        training = TwigTraining(self, self.parts["pruning_head"], model, batch)
        if model.phase in (None, "distill"):
            return training.distill()
        if model.phase == "reinforce":
            return training.reinforce()
        raise UsageError(f"twigvlm-pp: phase is distill or reinforce, not {model.phase!r}")

    def reward_counts(self, visual_tokens: int) -> list[int]:
        """List the values of R among which the second phase draws (7.7), ascending."""
        averages = [budget * visual_tokens / TOKENS for budget in BUDGETS]
        counts = (self.kept_at(average, visual_tokens) for average in averages)
        return sorted({min(max(count, 1), visual_tokens) for count in counts})


METHOD = TwigVLMPlus
