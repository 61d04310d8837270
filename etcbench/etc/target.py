"""The statistic that Z must keep: visual states, weighted by the text's attention (eqs. 8-11)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from etcbench.etc.method import TextRows
from etcbench.selection import Selection
from etcbench.states import Attention

# Attention weights held at a time, 128 MB in fp32, and the rows that show how many a row has.
CHUNK, FIRST_ROWS = 1 << 25, 16


def voting_tokens(batch: Any, which: TextRows) -> Tensor:
    """Mark the text tokens whose attention is averaged (register E2).

    Parameters
    ----------
    batch : etcbench.packing.PackedBatch
        Packed turns.
    which : {"instruction", "all_non_label", "all"}
        Tokens of the questions; all but the answers; all.

    Returns
    -------
    Tensor
        Bool, shape (batch, text tokens).
    """
    if which == "instruction":
        instruction: Tensor = batch.instruction
        return instruction
    text: Tensor = batch.turns >= 0
    if which == "all":
        return text
    # The label of a position is the token behind it.
    answered = F.pad(batch.labels[:, :-1] >= 0, (1, 0))
    same_turn = F.pad(batch.turns[:, 1:] == batch.turns[:, :-1], (1, 0))
    return text & ~(answered & same_turn)


def text_attention(attention: Attention, votes: Tensor) -> Tensor:
    """Average a layer's attention over heads and voting tokens (eq. 9).

    Parameters
    ----------
    attention : Attention
        Of the alignment layer, as plain causal attention: the bottleneck would hide the picture.
    votes : Tensor, bool, shape (batch, tokens)
        Which positions vote.

    Returns
    -------
    Tensor
        fp32, shape (batch, tokens); zero where nothing votes.
    """
    index = Selection.from_mask(votes).index
    total = torch.zeros(votes.shape, device=votes.device)
    step, first = FIRST_ROWS, 0
    while first < index.shape[1]:
        rows = index[:, first : first + step]
        weights = attention.weights(rows.clamp_min(0)).float()
        shares = (rows >= 0).float()[:, None].expand(weights.shape[:3]) / weights.shape[1]
        with torch.autocast(votes.device.type, enabled=False):
            total = total + torch.bmm(shares.flatten(1)[:, None], weights.flatten(1, 2))[:, 0]
        first += step
        step = max(1, CHUNK // (weights.numel() // rows.shape[1]))
    return total / votes.sum(-1, keepdim=True).clamp_min(1)


def attention_weighted_target(
    visual: Tensor, attention: Tensor, alpha: float, present: Tensor | None = None
) -> Tensor:
    """Weight visual hidden states by the attention they receive (eqs. 10, 11).

    Parameters
    ----------
    visual : Tensor, shape (batch, N, D)
        Hidden states of the visual tokens at the alignment layer.
    attention : Tensor, shape (batch, N)
        Attention from the text, averaged over heads and text rows.
    alpha : float
        0 returns ``visual``; 1 silences the least attended token.
    present : Tensor, optional, bool, shape (batch, N)
        False where a picture has fewer tokens; default all.

    Returns
    -------
    Tensor
        fp32, shape (batch, N, D).
    """
    scores = attention.float()
    if present is None:
        present = torch.ones_like(scores, dtype=torch.bool)
    low = scores.masked_fill(~present, float("inf")).amin(-1, keepdim=True)
    high = scores.masked_fill(~present, float("-inf")).amax(-1, keepdim=True)
    # Spec 1.3 adds 1e-6 to every denominator. Over hundreds of tokens attention itself differs by
    # little more, and the most attended one would not keep its full weight; so only for ties.
    scaled = (scores - low) / (high - low + 1e-6 * (high == low))
    return ((1 - alpha) + alpha * scaled)[..., None] * visual.float()
