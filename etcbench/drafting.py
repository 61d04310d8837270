"""Drafters: a method's branch proposes what `etcbench.speculative` verifies.

One sequence at a time (spec selective 7.5), or a tree of the most probable ones (7.8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from etcbench.backbones.stream import Stream
from etcbench.branch import Branch, Chain, Tree
from etcbench.decoder import Decoder
from etcbench.kv import KVState
from etcbench.selection import Selection


@dataclass
class Draft:
    """Proposed continuations of a batch: for each row a tree whose root is the newest token.

    Attributes
    ----------
    tokens : Tensor, long, shape (batch, nodes)
        Proposals.
    parents : Tensor or None, long, shape (batch, nodes)
        Node in front of each, -1 for the root; None where each node follows the one before.
    valid : Tensor, bool, shape (batch, nodes)
        Which nodes exist.
    states : Stream or None
        Root and nodes behind the layers that the drafter shares with the model, whose caches hold
        them already; None where the verification has to run these layers.
    """

    tokens: Tensor
    parents: Tensor | None
    valid: Tensor
    states: Stream | None = None


class Drafter(Protocol):
    """Proposes continuations; whatever it proposes, the answers stay the same."""

    @property
    def shared(self) -> int:
        """Layers of the model whose output it reads."""
        ...

    def draft(self, kv: KVState, newest: Tensor, running: Tensor, room: Tensor) -> Draft:
        """Propose what follows each running row's ``newest`` token, which no cache holds yet.

        A draft of more than ``room - 1`` tokens, shape (batch,), is of no use.
        """
        ...

    def accept(self, kv: KVState, states: Stream, kept: Tensor) -> None:
        """Learn what stays: ``kept``, bool, shape (batch, 1 + nodes), of root and nodes.

        ``states`` are theirs behind the shared layers.
        """
        ...

    def rows(self, index: Tensor) -> None:
        """Go on with some of the rows."""
        ...


@dataclass
class ChainDrafter:
    """One sequence from a branch on the model's first layers, whose work is shared (7.5).

    The last token of a draft passes the branch at the beginning of the next draft, if it stays.

    Attributes
    ----------
    stops : bool
        Whether an end token ends a draft.
    unseen : Stream or None
        Last tokens, behind the shared layers.
    """

    decoder: Decoder
    branch: Branch
    plan: Chain
    stops: bool = True
    unseen: Stream | None = None

    @property
    def shared(self) -> int:
        """Layers under the branch."""
        return self.branch.start

    def draft(self, kv: KVState, newest: Tensor, running: Tensor, room: Tensor) -> Draft:
        """Draft until the branch is unsure, an answer ends, or the draft is long enough."""
        ends = sorted(self.decoder.backbone.eos_ids) if self.stops else []
        ending = torch.tensor(ends, device=newest.device)
        states: list[Stream] = []
        tokens: list[Tensor] = []
        valid: list[Tensor] = []
        token, exists, drafting = newest, running, running
        for step in range(self.plan.length + 1):
            place = torch.full_like(newest, step)[:, None]
            stream = self.decoder.embed(kv, token[:, None], place, exists[:, None])
            states.append(self.decoder.behind(stream, kv, 0, self.shared))
            drafting = drafting & (room > step + 1)
            if step and (step == self.plan.length or not drafting.any()):
                break
            fresh = states[-1]
            if self.unseen is not None and not step:
                fresh = Stream.cat([self.unseen, fresh])
            grown = self.decoder.grow(fresh, kv)
            if not drafting.any():
                break
            chances = self.branch.logits(grown.hidden[:, -1]).float().softmax(-1).max(-1)
            token, exists = chances.indices, drafting
            tokens.append(token)
            valid.append(exists)
            sure = chances.values >= self.plan.confidence
            drafting = drafting & sure & ~torch.isin(token, ending)
        none = newest.new_zeros(len(newest), 0)
        return Draft(
            torch.stack(tokens, 1) if tokens else none,
            None,
            torch.stack(valid, 1) if valid else none.bool(),
            Stream.cat(states),
        )

    def accept(self, kv: KVState, states: Stream, kept: Tensor) -> None:
        """Take what is rejected out of the branch's cache."""
        assert kv.branch is not None
        last = kept.clone()
        last[:, :-1] = False
        ran = kept if kept.shape[1] == 1 else kept[:, :-1]
        kv.branch.settle(ran)
        waits = kept.shape[1] > 1 and bool(last.any())
        self.unseen = states.select(Selection.from_mask(last)) if waits else None

    def rows(self, index: Tensor) -> None:
        """Go on with some of the rows."""
        self.unseen = self.unseen and self.unseen.rows(index)


@dataclass
class TreeDrafter:
    """A tree of the branch's most probable continuations (7.8).

    As in the released code the verification runs through all layers, the shared ones included, so
    of the draft nothing stays in a cache but the root.

    Attributes
    ----------
    unseen : Stream or None
        Accepted tokens that the branch has not run on, behind the shared layers.
    """

    decoder: Decoder
    branch: Branch
    plan: Tree
    unseen: Stream | None = None

    @property
    def shared(self) -> int:
        """Layers under the branch."""
        return self.branch.start

    def draft(self, kv: KVState, newest: Tensor, running: Tensor, room: Tensor) -> Draft:
        """Continue the best nodes depth by depth; of all nodes keep the most probable."""
        assert kv.branch is not None
        batch, width = len(newest), self.plan.width
        root = self._under(kv, newest[:, None], running, 0)
        fresh = root if self.unseen is None else Stream.cat([self.unseen, root])
        states = self.decoder.grow(fresh, kv).hidden[:, -1:]
        tokens, scores = self._children(states, torch.zeros((batch, 1), device=newest.device))
        nodes = [(tokens, scores, torch.full_like(tokens, -1))]
        # Places, in the last generation, of the nodes that are continued, and which of the nodes
        # that have been continued so far each of them descends from.
        front = scores.topk(min(width, scores.shape[1])).indices
        above = torch.zeros((*front.shape, 0), dtype=torch.bool, device=newest.device)
        passed = 0
        for step in range(1, min(self.plan.depth, int(room.max()) - 1)):
            own = torch.eye(front.shape[1], dtype=torch.bool, device=newest.device)
            within = torch.cat([above, own.expand(batch, -1, -1)], -1)
            stream = self._under(kv, tokens.gather(1, front), running, step, within)
            states = self.decoder.grow(stream, kv, within=within).hidden
            number = (passed + front)[..., None]
            passed += tokens.shape[1]
            tokens, scores = self._children(states, scores.gather(1, front))
            each = tokens.shape[1] // front.shape[1]
            nodes.append((tokens, scores, number.expand(-1, -1, each).flatten(1)))
            front = scores.topk(min(width, scores.shape[1])).indices
            parent = (front // each)[..., None].expand(-1, -1, within.shape[2])
            above = within.gather(1, parent)
        continued = running.new_zeros(batch, above.shape[2])
        kv.branch.settle(continued)
        kv.settle(torch.cat([continued, continued.new_zeros(batch, 1)], 1), self.shared)
        return self._best(nodes, running, room)

    def _under(
        self, kv: KVState, tokens: Tensor, running: Tensor, step: int, within: Tensor | None = None
    ) -> Stream:
        """Run drafted tokens, all ``step`` behind the root, through the shared layers."""
        valid = running[:, None].expand(tokens.shape)
        stream = self.decoder.embed(kv, tokens, torch.full_like(tokens, step), valid)
        return self.decoder.behind(stream, kv, 0, self.shared, within)

    def _children(self, states: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Most probable next tokens and their cumulative log-probabilities, (batch, children)."""
        chances = self.branch.logits(states).float().log_softmax(-1)
        best = chances.topk(min(self.plan.children, chances.shape[-1]))
        return best.indices.flatten(1), (scores[..., None] + best.values).flatten(1)

    def _best(
        self, nodes: list[tuple[Tensor, Tensor, Tensor]], running: Tensor, room: Tensor
    ) -> Draft:
        """Keep the nodes with the highest cumulative probability.

        It never grows with depth, and the sort takes parents first where it is equal, so no node
        is kept without its parent.
        """
        tokens, scores, parents = (torch.cat(part, 1) for part in zip(*nodes, strict=True))
        sizes = torch.tensor([len(part[0][0]) for part in nodes], device=tokens.device)
        depth = torch.arange(1, len(nodes) + 1, device=tokens.device).repeat_interleave(sizes)
        valid = running[:, None] & (depth < room[:, None])
        ranked = scores.masked_fill(~valid, float("-inf"))
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        chosen = order[:, : self.plan.nodes].sort(-1).values
        slots = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
        place = torch.full_like(tokens, -1).scatter(1, chosen, slots)
        parents = parents.gather(1, chosen)
        moved = place.gather(1, parents.clamp_min(0)).masked_fill(parents < 0, -1)
        return Draft(tokens.gather(1, chosen), moved, valid.gather(1, chosen))

    def accept(self, kv: KVState, states: Stream, kept: Tensor) -> None:
        """Note what the branch has still to run on: all that stays but the root."""
        behind = kept.clone()
        behind[:, 0] = False
        self.unseen = states.select(Selection.from_mask(behind)) if behind.any() else None

    def rows(self, index: Tensor) -> None:
        """Go on with some of the rows."""
        self.unseen = self.unseen and self.unseen.rows(index)
