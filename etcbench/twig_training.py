"""What trains the pruning head: distillation from the model, then reward by the answer it leaves.

From spec selective 7.7. Two phases of TwigVLM++; the model itself stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import exp
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etcbench.selection import Kind, Layout, Selection
from etcbench.twig import visual_attention, visual_places

TEMPERATURE, CLIP = 5.0, 4.0
SEQUENCES = 512  # pruned sequences that are run at once


@dataclass
class TwigTraining:
    """Losses of one batch.

    Parameters
    ----------
    method : etcbench.baselines.twigvlm_pp.TwigVLMPlus
        Layers, weights of the losses, the twig.
    head : PruningHead
        The pruning head.
    model : etcbench.training.CompressionModel
        The frozen model.
    batch : etcbench.packing.PackedBatch
        Pictures and packed turns.
    """

    method: Any
    head: nn.Module
    model: Any
    batch: Any

    def distill(self) -> dict[str, Tensor]:
        """L_NTP + 0.1 L_pred + 1.0 L_attn, for all parts of the twig."""
        method, model, batch = self.method, self.model, self.batch
        grown = method.grow(model, self.inputs, method.grown - 1)
        logits = method.branch.logits(model.answer_states(grown, batch))
        result: dict[str, Tensor] = model.answer_loss(logits, batch)
        with torch.no_grad():
            final = model.decoder.run(
                self.taught, None, method.teacher, method.layers, select=False
            )
            teacher = model.backbone.logits(model.answer_states(final, batch))
        weights = batch.weights[batch.labels >= 0].to(logits.device)
        predicted = (softened_divergence(teacher, logits) * weights).sum()
        attended = self.attention_loss()
        loss = result["loss"] + method.prediction_weight * predicted
        parts = {"prediction": predicted.detach(), "attention": attended.detach()}
        return {**result, "loss": loss + method.attention_weight * attended, **parts}

    def reinforce(self) -> dict[str, Tensor]:
        """-mean(advantage * log pi) over drawn sets, for the gates (group-relative reward)."""
        shares = self.shares
        numbers, turns = self.questions[1].nonzero(as_tuple=True)
        counts = self.method.reward_counts(visual_places(self.states.layout).shape[1])
        chosen = draw_budget(self.model.progress, len(counts))
        likely = shares[numbers, turns]
        drawn = draw_without_replacement(likely, self.method.rollouts, counts[chosen])
        rewards = self.rewards(drawn, numbers, turns)
        loss = -(advantages(rewards) * set_log_probability(likely, drawn)).sum()
        loss = loss / max(rewards.numel(), 1)
        if self.method.reinforced_attention:
            growth = 1 + chosen / max(len(counts) - 1, 1)
            loss = loss + self.method.reinforced_attention * growth**2 * self.attention_loss()
        return {
            "loss": loss,
            "reward": rewards.sum() / max(rewards.numel(), 1),
            "kept": rewards.new_tensor(float(counts[chosen])),
        }

    @cached_property
    def states(self) -> Any:
        """Output of the model's layer K - 1."""
        return self.model.frozen(self.batch, self.method.first)

    @cached_property
    def inputs(self) -> Any:
        """Input of the last twig layer."""
        return self.method.grow(self.model, self.states, stop=self.method.grown - 1)

    @cached_property
    def questions(self) -> tuple[Tensor, Tensor]:
        """See `answer_rows`."""
        return answer_rows(self.batch, self.states.layout)

    @cached_property
    def shares(self) -> Tensor:
        """Distribution of every question over the visual tokens, (batch, turns, visual)."""
        attention = self.model.decoder.attention(self.method.branch.layers[-1], self.inputs)
        shares: Tensor = self.head(attention, self.questions[0], self.states.layout)
        return shares

    @cached_property
    @torch.no_grad()
    def taught(self) -> Any:
        """Input of the layer whose attention is learned."""
        method = self.method
        return self.model.decoder.run(self.states, None, method.first, method.teacher, select=False)

    def attention_loss(self) -> Tensor:
        """L_attn: divergence from the model's own attention, mean of the questions."""
        rows, asked = self.questions
        with torch.no_grad():
            attention = self.model.decoder.attention(self.method.teacher, self.taught)
            teacher = visual_attention(attention, rows, self.taught.layout).mean(1)
        lost = divergence(teacher, self.shares)
        return (lost * asked).sum() / asked.sum().clamp_min(1)

    @torch.no_grad()
    def rewards(self, drawn: Tensor, numbers: Tensor, turns: Tensor) -> Tensor:
        """Mean log-probability of the reference answers under the model pruned to drawn sets.

        Parameters
        ----------
        drawn : Tensor, long, shape (cases, rollouts, R)
            Visual tokens that stay.
        numbers, turns : Tensor, long, shape (cases,)
            Row of the batch and turn of each case.

        Returns
        -------
        Tensor
            fp32, shape (cases, rollouts).
        """
        found = [drawn.new_zeros((0, drawn.shape[1]), dtype=torch.float)]
        step = max(SEQUENCES // drawn.shape[1], 1)
        for parts in zip(drawn.split(step), numbers.split(step), turns.split(step), strict=True):
            found.append(self._rewards(*parts))
        return torch.cat(found)

    def _rewards(self, drawn: Tensor, numbers: Tensor, turns: Tensor) -> Tensor:
        method, decoder, backbone = self.method, self.model.decoder, self.model.backbone
        cases, rollouts, _ = drawn.shape
        layout = self.states.layout
        visual, turn = layout.is_kind(Kind.VISUAL)[numbers], layout.turn[numbers]
        own = layout.valid[numbers] & ((turn < 0) | (turn == turns[:, None])) & ~visual
        places = visual_places(layout)[numbers, None].expand(-1, rollouts, -1).gather(-1, drawn)
        keep = own[:, None].repeat(1, rollouts, 1).scatter(-1, places, True)
        selection = Selection.from_mask(keep.flatten(0, 1))
        repeated = numbers.repeat_interleave(rollouts)
        labels = F.pad(
            self.batch.labels.to(drawn.device), (visual.shape[1] - self._width, 0), value=-100
        )
        labels = selection.gather(labels[repeated], -100)
        # A difference between two sets may be below what half precision resolves.
        with torch.autocast(drawn.device.type, enabled=False):
            stream = self.states.rows(repeated).select(selection)
            stream = replace(stream, hidden=stream.hidden.to(backbone.dtype))
            stream = decoder.run(stream, None, method.first, method.wiped, select=False)
            wiped = Selection.from_mask(stream.layout.valid & ~stream.layout.is_kind(Kind.VISUAL))
            stream, labels = stream.select(wiped), wiped.gather(labels, -100)
            stream = decoder.run(stream, None, method.wiped, method.layers, select=False)
            wanted = labels >= 0
            logits = backbone.logits(stream.hidden[wanted]).float()
        each = torch.zeros(labels.shape, device=drawn.device)
        each[wanted] = -F.cross_entropy(logits, labels[wanted], reduction="none")
        return (each.sum(-1) / wanted.sum(-1).clamp_min(1)).view(cases, rollouts)

    @property
    def _width(self) -> int:
        return int(self.batch.labels.shape[1])


def answer_rows(batch: Any, layout: Layout) -> tuple[Tensor, Tensor]:
    """Find the last prompt token of every turn.

    Returns
    -------
    Tensor, long, shape (batch, turns)
        Its position.
    Tensor, bool, shape (batch, turns)
        Whether there is such a turn on a picture.
    """
    predicts = (batch.labels >= 0).to(layout.kind.device)
    turns = batch.turns.to(layout.kind.device)
    count = int(turns.max()) + 1
    first = torch.stack([predicts & (turns == turn) for turn in range(count)], 1)
    shown = layout.is_kind(Kind.VISUAL).any(-1, keepdim=True)
    begin = layout.tokens - turns.shape[1]
    return first.byte().argmax(-1) + begin, first.any(-1) & shown


def draw_budget(progress: float, count: int) -> int:
    """Draw a place in the ascending list of budgets: P(i) ~ exp(-8 progress^2 i)."""
    odds = torch.tensor([exp(-8 * progress**2 * number) for number in range(count)])
    return int(torch.multinomial(odds, 1))


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of probabilities, summed over the last dimension."""
    tiny = torch.finfo(torch.float32).tiny
    logs = teacher.clamp_min(tiny).log() - student.clamp_min(tiny).log()
    return (teacher * logs).sum(-1)


def softened_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """L_pred of each token: KL at temperature 5 times its square, soft-clipped at 4, over 4.

    The spec gives no formula for the soft clip; c tanh(x / c) is the one used here.

    Parameters
    ----------
    teacher, student : Tensor, shape (tokens, vocabulary)
        Logits.
    """
    soft = (teacher.float() / TEMPERATURE).softmax(-1), (student.float() / TEMPERATURE).softmax(-1)
    return (divergence(*soft) * TEMPERATURE**2 / CLIP).tanh()


def draw_without_replacement(probabilities: Tensor, rollouts: int, count: int) -> Tensor:
    """Draw ordered sets: the best of log-probabilities plus Gumbel noise.

    Parameters
    ----------
    probabilities : Tensor, shape (cases, tokens)
        Zero for what may not be drawn.

    Returns
    -------
    Tensor
        Long, shape (cases, rollouts, count), in the order drawn.
    """
    shape = (len(probabilities), rollouts, probabilities.shape[-1])
    noise = -torch.empty(shape, device=probabilities.device).exponential_().log()
    return (probabilities.detach().log()[:, None] + noise).topk(count, -1).indices


def set_log_probability(probabilities: Tensor, drawn: Tensor) -> Tensor:
    """Log of prod_j s_j / (1 - sum of those drawn before), shape (cases, rollouts) (7.7)."""
    tiny = torch.finfo(torch.float32).eps
    wide = probabilities[:, None].expand(-1, drawn.shape[1], -1)
    each = wide.gather(-1, drawn)
    before = each.cumsum(-1) - each
    return (each.clamp_min(tiny).log() - (1 - before).clamp_min(tiny).log()).sum(-1)


def advantages(rewards: Tensor) -> Tensor:
    """Rewards of a group, shape (cases, rollouts), less their mean, over their deviation."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / rewards.std(-1, keepdim=True).clamp_min(1e-6)
