"""ExplainC (reconstruction): a small network predicts which visual tokens an answer will rely on.

From spec selective 8; the method of arXiv 2506.01097 has no public code, so this is a
reconstruction and is to be reported as "ExplainC (reconstruction)". The relevance of each visual
token to the model's own answer (gradient-weighted attention rollout, 8.2) is the label; a
convolutional student predicts it from what the instruction attends to in layer 0 (8.4); the best
tokens are kept in front of layer 0.

Decisions of its register (11.17): head mean as the student's one input channel, kernel 3, ReLU,
original positions kept, gradient of the answer token's logit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from etcbench.compressor import (
    Compressor,
    DecodePositions,
    ModelSpec,
    Numbering,
    Reuse,
    top_mask,
)
from etcbench.costs import Case
from etcbench.errors import UsageError
from etcbench.selection import Kind, Selection
from etcbench.states import PromptState, RelevanceRule, Signs, Target, Weighting
from etcbench.student import Activation, Student, relevance_label

Scores = Literal["student", "attention", "relevance", "random"]
Heads = Literal["mean", "each"]
Positions = Literal["keep", "contiguous"]


@dataclass(eq=False)
class ExplainC(Compressor):
    """Keep the visual tokens with the highest predicted relevance, in front of layer 0.

    Parameters
    ----------
    scores : {"student", "attention", "relevance", "random"}
        What ranks the tokens: the trained student; its input, the instruction's attention in layer
        0; the true relevance, which costs a full run and a backward pass for each answer token
        (the oracle of 8.9); or chance, the same for every picture, as a control.
    heads : {"mean", "each"}
        Input channels of the student: the mean of the heads, or one each.
    depth, kernel : int
        Layers of the student (3, 5, 7 and 10 in the paper's ablation) and their width.
    activation : {"relu", "gelu"}
        Of the student.
    positions : {"keep", "contiguous"}
        Whether survivors keep their positions (8.6).
    weighting : {"gradient", "attention"}
        Relevance from attention times gradient, or from attention alone (ablation in 8.4).
    target : {"logit", "probability"}
        What of an answer token the gradient is taken of (8.2).
    signs : {"positive", "both"}
        Whether what speaks against the answer is clipped (8.2), or counts as much.
    seed : int
        Of the random control.
    """

    query_aware: ClassVar[bool] = True
    trained: ClassVar[bool] = True
    any_budget: ClassVar[bool] = True

    scores: Scores = "student"
    heads: Heads = "mean"
    depth: int = 5
    kernel: int = 3
    activation: Activation = "relu"
    positions: Positions = "keep"
    weighting: Weighting = "gradient"
    target: Target = "logit"
    signs: Signs = "positive"
    seed: int = 0

    @classmethod
    def needs_weights(cls, options: dict[str, Any]) -> bool:
        """Only the student has weights."""
        return options.get("scores", "student") == "student"

    def prepare(self, spec: ModelSpec) -> None:
        """Check the options and build the student."""
        if self.depth < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError("explainc: depth is at least 1 and kernel is odd")
        self.student: Student | None = None
        if self.scores == "student":
            channels = spec.heads if self.heads == "each" else 1
            self.student = Student(channels, self.depth, self.kernel, self.activation)

    @property
    def module(self) -> nn.Module | None:
        """The student."""
        return self.student

    @property
    def reuse(self) -> Reuse:
        """Nothing in the decoder; the visual tokens themselves."""
        return "layers"

    @property
    def numbering(self) -> Numbering:
        """Keep positions, or count anew."""
        return "keep" if self.positions == "keep" else "reindex"

    @property
    def decode_positions(self) -> DecodePositions:
        """Behind what is left; survivors that keep their positions leave no gap there (8.6)."""
        return "layer"

    def own_macs(self, case: Case) -> int:
        """Count the text's rows of layer 0, with all keys, and the student (8.7)."""
        if self.scores == "relevance":
            raise UsageError("explainc: what the oracle (scores=relevance) costs is not counted")
        prompt = case.prompt(case.visual)
        rows = case.score_rows(case.after, prompt, keys_of=prompt)
        return rows + (self.student.macs(case.visual) if self.student else 0)

    def select_prompt(self, state: PromptState) -> Selection | None:
        """Keep the best visual tokens and all text, in order (8.6)."""
        assert self.budget is not None
        visual = state.layout.is_kind(Kind.VISUAL)
        if not visual.any():
            return None
        ranks = torch.zeros(visual.shape, device=visual.device)
        present = Selection.from_mask(visual).index >= 0
        ranks[visual] = self._scores(state)[present]
        pictures = (state.layout.image.amax(-1) + 1).tolist()
        rows = zip(visual.sum(-1).tolist(), pictures, strict=True)
        limit = torch.tensor([self.budget.of(*row) for row in rows], device=visual.device)
        kept = top_mask(ranks, visual, limit)
        return Selection.from_mask((state.layout.valid & ~visual) | kept)

    def _scores(self, state: PromptState) -> Tensor:
        """Score of each visual token, shape (batch, tokens)."""
        if self.scores == "relevance":
            return self._relevance(state)
        seen, present = self.observe(state)
        if self.scores == "random":
            generator = torch.Generator().manual_seed(self.seed)
            chance = torch.rand(present.shape[1], generator=generator)
            return chance.to(seen.device).expand_as(present)
        if self.student is None:
            return seen.mean(1)
        return self.student(seen, present).exp()

    def _relevance(self, state: PromptState) -> Tensor:
        visual = Selection.from_mask(state.layout.is_kind(Kind.VISUAL))
        rule = RelevanceRule(self.weighting, self.target, self.signs)
        return visual.gather(state.relevance(rule))

    def observe(self, state: PromptState) -> tuple[Tensor, Tensor]:
        """Read what the student sees: layer-0 attention from the text behind the picture (8.4).

        Returns
        -------
        tuple of Tensor
            Attention on the visual tokens, mean over the text, shape (batch, channels, tokens);
            which tokens are there, bool, shape (batch, tokens). Each row is scaled to mean 1: by
            its sum, as the register has it, and by the tokens, lest the student's input vanish.
        """
        rows = Selection.from_mask(state.layout.is_kind(Kind.SUFFIX)).index
        weights = state.attention.weights(rows.clamp_min(0)).float()
        mean = (weights * (rows >= 0)[:, None, :, None]).sum(2)
        if self.heads == "mean":
            mean = mean.mean(1, keepdim=True)
        visual = Selection.from_mask(state.layout.is_kind(Kind.VISUAL))
        seen = visual.gather(mean.transpose(1, 2)).transpose(1, 2)
        present = visual.index >= 0
        total = seen.sum(-1, keepdim=True).clamp_min(torch.finfo(seen.dtype).tiny)
        return seen / total * present.sum(-1)[:, None, None], present

    def training_example(self, state: PromptState) -> dict[str, Tensor]:
        """Note what the student sees and the relevance that it is to predict."""
        seen, present = self.observe(state)
        return {"seen": seen, "present": present, "relevance": self._relevance(state)}

    def objective(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """KL divergence of the student from the label (8.5)."""
        examples = getattr(batch, "examples", None)
        if examples is None or self.student is None:
            raise UsageError("explainc: the student learns in stages with precompute")
        label = relevance_label(examples["relevance"], examples["present"])
        with torch.autocast(label.device.type, enabled=False):
            predicted = self.student(examples["seen"], examples["present"])
        kl = (torch.xlogy(label, label) - label * predicted).sum(-1).mean()
        return {"loss": kl, "kl": kl.detach()}


METHOD = ExplainC
