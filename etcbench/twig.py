"""Arithmetic of twig-guided pruning: the gated pruning head and what its training is made of.

From spec selective 7.6 and 7.7; used by `etcbench.baselines.twigvlm_pp`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etcbench.budget import ModelSpec
from etcbench.selection import Kind, Layout, Selection
from etcbench.states import Attention

TEMPERATURE, CLIP = 5.0, 4.0


class Gate(nn.Linear):
    """ReLU(Wx) * sigmoid(Wx), without bias (7.6)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Gate values of the same shape but for the last dimension."""
        projected = super().forward(x)
        return projected.relu() * projected.sigmoid()


class PruningHead(nn.Module):
    """P-Head: gates on the queries and keys of the last twig layer.

    With fewer key than query heads the key gate has the keys' width (7.6).
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.query = Gate(spec.hidden, spec.heads * spec.head_dim)
        self.key = Gate(spec.hidden, spec.kv_heads * spec.head_dim)

    def forward(self, attention: Attention, rows: Tensor, layout: Layout) -> Tensor:
        """Distribution of each row over the visual tokens, mean of the heads.

        Returns
        -------
        Tensor
            fp32, shape (batch, rows, visual), in the order of `visual_places`.
        """
        return visual_attention(attention, rows, layout, (self.query, self.key)).mean(1)


def visual_places(layout: Layout) -> Tensor:
    """Positions of each row's visual tokens, shape (batch, visual); -1 for padding."""
    return Selection.from_mask(layout.is_kind(Kind.VISUAL)).index


def visual_attention(
    attention: Attention,
    rows: Tensor,
    layout: Layout,
    gates: tuple[nn.Module, nn.Module] | None = None,
) -> Tensor:
    """Softmax over the visual tokens only, per head: fp32, (batch, heads, rows, visual)."""
    places = visual_places(layout)
    logits = attention.logits(rows, places.clamp_min(0), gates).float()
    return logits.masked_fill((places < 0)[:, None, None], float("-inf")).softmax(-1).nan_to_num()


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
