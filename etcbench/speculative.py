"""Speculative decoding: a cheap drafter proposes tokens, the model verifies them in one pass.

The answer is that of plain greedy decoding of the same (pruned) model, token by token: a draft
counts only as far as it equals the model's own choice, and every verification adds one token of
the model's (spec selective 7.5, 7.8). Rows of a batch accept different lengths; what is rejected
leaves every layer's cache. A method's branch is the drafter (`Compressor.speculation`).

Unlike the released code the first draft follows the prefill instead of being verified by it,
because here a prefill serves several questions; that is one pass more per answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etcbench.backbones.stream import Stream
from etcbench.branch import Chain
from etcbench.decoder import Decoder
from etcbench.drafting import ChainDrafter, Draft, Drafter, TreeDrafter
from etcbench.kv import KVState


@dataclass
class Drafts:
    """What became of the drafts for one answer.

    Attributes
    ----------
    verifications : int
        Passes of the model behind the prefill.
    drafted, accepted : int
        Tokens on the longest path of each draft; those of them that the model would have chosen.
    """

    verifications: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass
class Decoded:
    """Answer of one row, without the end token, and its drafts if there were any."""

    tokens: list[int]
    drafts: Drafts | None = None


def decode(
    decoder: Decoder, kv: KVState, logits: Tensor, max_new_tokens: int, stops: bool = True
) -> list[Decoded]:
    """Decode greedily, with drafts where the method brings a way to draft.

    Parameters
    ----------
    kv : KVState
        After the prefill.
    logits : Tensor, shape (batch, vocabulary)
        What the prefill predicts.
    stops : bool
        Whether an end token ends an answer; without, all have the full length (for measuring).
    """
    plan = decoder.compressor.speculation
    if plan is None:
        plain = decoder.greedy(kv, logits, max_new_tokens, stops)
        return [Decoded(tokens) for tokens in plain]
    branch = decoder.compressor.branch
    assert branch is not None and kv.branch is not None
    drafter: Drafter = (
        ChainDrafter(decoder, branch, plan, stops)
        if isinstance(plan, Chain)
        else TreeDrafter(decoder, branch, plan)
    )
    return speculate(decoder, kv, logits, max_new_tokens, drafter, stops)


def speculate(
    decoder: Decoder,
    kv: KVState,
    logits: Tensor,
    max_new_tokens: int,
    drafter: Drafter,
    stops: bool = True,
) -> list[Decoded]:
    """Draft, verify and accept until every row has ended.

    Rows that have ended leave the batch once half of it is idle.
    """
    ends = decoder.backbone.eos_ids if stops else set()
    found = [Decoded([], Drafts()) for _ in range(len(logits))]
    rows, newest = list(range(len(logits))), logits.argmax(-1)
    alive = [_extend(found[row], [token], ends, max_new_tokens)
             for row, token in zip(rows, newest.tolist(), strict=True)]  # fmt: skip
    while any(alive):
        if sum(alive) * 2 <= len(alive):
            left = torch.tensor([n for n, on in enumerate(alive) if on], device=newest.device)
            kv, newest, rows = kv.rows(left), newest[left], [rows[n] for n in left.tolist()]
            drafter.rows(left)
            alive = [True] * len(rows)
        running = torch.tensor(alive, device=newest.device)
        left_over = [max_new_tokens - len(found[row].tokens) for row in rows]
        room = torch.tensor(left_over, device=newest.device)
        draft = drafter.draft(kv, newest, running, room)
        lineage = _lineage(draft)
        states, choices = _verify(decoder, kv, newest, running, draft, lineage, drafter.shared)
        best, depth = _accepted(draft, lineage, choices)
        kept = lineage.gather(1, best[:, None, None].expand(-1, 1, lineage.shape[2]))[:, 0]
        kept = kept & running[:, None]
        kv.settle(kept)
        kv.next_position = kv.next_position + kept.sum(-1)
        drafter.accept(kv, states, kept)
        newest = choices.gather(1, best[:, None])[:, 0]
        fed = torch.cat([newest[:, None], draft.tokens], 1).tolist()
        valid = torch.cat([running[:, None], draft.valid], 1)
        longest = ((lineage.sum(-1) - 1) * valid).amax(-1).tolist()
        for place, (row, path) in enumerate(zip(rows, kept.tolist(), strict=True)):
            if alive[place]:
                record = found[row]
                assert record.drafts is not None
                record.drafts.verifications += 1
                record.drafts.drafted += longest[place]
                record.drafts.accepted += int(depth[place])
                tokens = [t for t, on in zip(fed[place][1:], path[1:], strict=True) if on]
                alive[place] = _extend(record, [*tokens, fed[place][0]], ends, max_new_tokens)
    return found


def _extend(record: Decoded, tokens: list[int], ends: set[int], limit: int) -> bool:
    """Append up to an end token or the limit; whether the answer goes on."""
    for token in tokens:
        if token in ends or len(record.tokens) >= limit:
            return False
        record.tokens.append(token)
    return len(record.tokens) < limit


def _lineage(draft: Draft) -> Tensor:
    """Which of root and nodes each of them descends from, itself included; bool, square."""
    batch, count = draft.tokens.shape
    device = draft.tokens.device
    own = torch.eye(count + 1, dtype=torch.bool, device=device)
    if draft.parents is None:
        return own.new_ones(own.shape).tril().expand(batch, -1, -1)
    root = draft.parents.new_zeros(batch, 1)
    before = torch.cat([root, draft.parents + 1], 1)[..., None].expand(-1, -1, count + 1)
    lineage = own.expand(batch, -1, -1)
    while True:
        longer = lineage | lineage.gather(1, before)
        if torch.equal(longer, lineage):
            return lineage
        lineage = longer


def _verify(
    decoder: Decoder,
    kv: KVState,
    newest: Tensor,
    running: Tensor,
    draft: Draft,
    lineage: Tensor,
    shared: int,
) -> tuple[Stream, Tensor]:
    """Run root and nodes through the model.

    Returns
    -------
    Stream, Tensor
        Their states behind the shared layers, and the model's choice after each, shape
        (batch, 1 + nodes).
    """
    within = None if draft.parents is None else lineage
    states = draft.states
    if states is None:
        tokens = torch.cat([newest[:, None], draft.tokens], 1)
        valid = torch.cat([running[:, None], draft.valid & running[:, None]], 1)
        stream = decoder.embed(kv, tokens, lineage.sum(-1) - 1, valid)
        states = decoder.behind(stream, kv, 0, shared, within) if shared else stream
    final = decoder.behind(states, kv, shared, decoder.layers, within)
    return states, decoder.backbone.logits(final.hidden).argmax(-1)


def _accepted(draft: Draft, lineage: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
    """Last node of the longest path that the model would have taken, and its depth; (batch,)."""
    batch, count = draft.tokens.shape
    steps = torch.arange(count, device=choices.device)
    before = steps.expand(batch, -1) if draft.parents is None else draft.parents + 1
    right = (choices.gather(1, before) == draft.tokens) & draft.valid
    root = right.new_ones(batch, 1)
    right = (~lineage | torch.cat([root, right], 1)[:, None]).all(-1)
    depth = ((lineage.sum(-1) - 1) * right).max(-1)
    return depth.indices, depth.values
