"""Selective methods a second time, for one prompt: the spec's rules as loops over single tokens.

Nothing is shared with the package but transformers' own modules. `Plain` runs the layers by their
parts with eager attention; a rule looks at what a layer has made of the sequence (`Seen`) and says
what each token of the next one is made of (`Slots`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from tiny import reference_inputs
from torch import Tensor

from etcbench.backbones import Backbone

BEFORE, VISUAL, BEHIND = 0, 1, 2
Slots = list[tuple[int, dict[int, float]]]  # each token's own source, and the weights of all


@dataclass
class Seen:
    """One layer on one sequence; logits and weights are (heads, queries, keys)."""

    layer: int
    x: Tensor  # its output (tokens, width), DeepStack included
    kind: list[int]
    inputs: Tensor  # normed
    query: Tensor
    key: Tensor
    logits: Tensor
    weights: Tensor
    following: Callable[[int], Seen]  # another layer on this layer's output
    rater: list[bool]
    tables: tuple[Tensor, Tensor]

    @property
    def visual(self) -> list[int]:
        return [i for i, kind in enumerate(self.kind) if kind == VISUAL]

    def only(self, chosen: list[int]) -> Slots:
        """Keep these visual tokens and all text, in order."""
        return [(i, {i: 1.0}) for i, k in enumerate(self.kind) if k != VISUAL or i in chosen]


Rule = Callable[[Seen], "Slots | None"]


def best(scores: Tensor, among: list[int], count: int) -> list[int]:
    """The highest ones in sequence order."""
    return sorted(sorted(among, key=lambda i: -float(scores[i]))[:count])


class Plain:
    """One question on one picture."""

    def __init__(self, backbone: Backbone, question: str) -> None:
        self.text = backbone.model.model.language_model
        self.blocks, self.head = list(self.text.layers), backbone.model.lm_head
        inputs = reference_inputs(backbone, question, 0)
        is_image = inputs["input_ids"][0] == backbone.model.config.image_token_id
        places = is_image.nonzero()[:, 0].tolist()
        self.kind = [
            VISUAL if i in places else BEFORE if i < places[0] else BEHIND
            for i in range(len(is_image))
        ]
        passed: list[tuple[Tensor, Tensor]] = []
        turned: list[Tensor] = []

        def note(_: Any, args: Any, named: Any, out: Any) -> None:
            x = args[0] if args else named["hidden_states"]
            out = out[0] if isinstance(out, tuple) else out
            passed.append((x[0].clone(), out[0].clone()))

        def turn(_: Any, args: Any, named: Any) -> None:
            turned.append(args[1] if len(args) > 1 else named["position_ids"])

        handles = [block.register_forward_hook(note, with_kwargs=True) for block in self.blocks]
        handles.append(self.text.rotary_emb.register_forward_pre_hook(turn, with_kwargs=True))
        backbone.model(**inputs)
        for handle in handles:
            handle.remove()
        self.x = passed[0][0]
        self.planes = turned[0].reshape(-1, len(is_image))  # (planes, tokens)
        # What DeepStack adds behind each layer: nothing on LLaVA.
        self.added = [passed[i + 1][0] - passed[i][1] for i in range(len(passed) - 1)]
        self.added.append(torch.zeros_like(self.x))
        embeds, visual = self.x, torch.tensor(places)
        words = [i for i, kind in enumerate(self.kind) if kind == BEHIND]
        received = (embeds[visual] @ embeds[words].T).softmax(-1).mean(0)
        self.rater = [False] * len(is_image)
        for word, share in zip(words, received.tolist(), strict=True):
            self.rater[word] = share > float(received.mean())

    def run(self, rule: Rule, reindex: bool = False, first: Rule | None = None) -> Tensor:
        """Logits behind the prompt; notes `places` and `positions` at each layer's input."""
        x, planes, kind, rater = self.x, self.planes, self.kind, self.rater
        added = list(self.added)
        place, number = [], 0
        for k in kind:
            place.append(number if k == VISUAL else -1)
            number += k == VISUAL
        self.places: list[list[int]] = []
        self.positions: list[Tensor] = []

        def apply(slots: Slots | None) -> None:
            nonlocal x, planes, kind, rater, added, place
            if slots is None:
                return
            dense = torch.zeros(len(slots), len(x))
            for out, (_, weights) in enumerate(slots):
                for source, weight in weights.items():
                    dense[out, source] = weight
            own = [source for source, _ in slots]
            x, added = dense @ x, [dense @ extra for extra in added]
            kind, rater = [kind[i] for i in own], [rater[i] for i in own]
            place, planes = [place[i] for i in own], planes[:, own]
            if reindex:
                planes = torch.arange(len(own)).expand(len(planes), -1)

        if first is not None:
            apply(first(self._seen(-1, x, x, planes, kind, rater, self.blocks[0])[0]))
        for number, block in enumerate(self.blocks):
            self.places.append([p for p in place if p >= 0])
            self.positions.append(planes)
            seen, out = self._seen(number, x, x, planes, kind, rater, block)
            x = seen.x = out + added[number]
            apply(rule(seen))
        return self.head(self.text.norm(x[-1]))

    def grown(self, blocks: Any, start: int, seen: Seen) -> Seen:
        """Further layers beside the model's, the last of them as it runs (spec 7.2, 7.11)."""
        x, planes = seen.x, self.positions[start - 1]
        for number, block in enumerate(blocks):
            last, out = self._seen(start + number, x, x, planes, seen.kind, seen.rater, block)
            x = out + self.added[start + number]
        return last

    def _seen(
        self,
        layer: int,
        x: Tensor,
        output: Tensor,
        planes: Tensor,
        kind: Any,
        rater: Any,
        block: Any,
    ) -> tuple[Seen, Tensor]:
        part, tokens = block.self_attn, len(x)
        inputs = block.input_layernorm(x)
        cos, sin = (
            table[0]
            for table in self.text.rotary_emb(
                x[None], planes[:, None] if len(planes) > 1 else planes
            )
        )

        def heads(name: str, norm: str) -> Tensor:
            values = getattr(part, name)(inputs).unflatten(-1, (-1, part.head_dim))
            values = getattr(part, norm)(values) if hasattr(part, norm) else values
            low, high = values.chunk(2, -1)
            turned = torch.cat([-high, low], -1)
            return values * cos[:, None] + turned * sin[:, None]

        query, key = heads("q_proj", "q_norm"), heads("k_proj", "k_norm")
        value = part.v_proj(inputs).unflatten(-1, (-1, part.head_dim))
        each = query.shape[1] // key.shape[1]
        every, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
        logits = torch.einsum("qhd,khd->hqk", query, every) / part.head_dim**0.5
        causal = torch.ones(tokens, tokens).tril().bool()
        weights = logits.masked_fill(~causal, float("-inf")).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, value).flatten(1)
        middle = x + part.o_proj(mixed)
        out = middle + block.mlp(block.post_attention_layernorm(middle))

        def following(number: int) -> Seen:
            return self._seen(number, seen.x, seen.x, planes, kind, rater, self.blocks[number])[0]

        seen = Seen(
            layer, output, kind, inputs, query, key, logits, weights, following, rater, (cos, sin)
        )
        return seen, out


# The rules (spec selective) ----------------------------------------------------------------------


def fastv(layer: int, count: int, everyone: bool = False) -> Rule:
    """2.2, 2.3: behind layer K - 1."""

    def rule(seen: Seen) -> Slots | None:
        if seen.layer != layer - 1:
            return None
        rows = seen.weights.mean(0)
        return seen.only(best(rows.mean(0) if everyone else rows[-1], seen.visual, count))

    return rule


def pdrop(counts: dict[int, int], raw: bool = False) -> Rule:
    """5.2: by the next layer's own queries and keys, on this layer's output; raw: the paper's."""

    def rule(seen: Seen) -> Slots | None:
        if seen.layer + 1 not in counts:
            return None
        rows = seen.logits if raw else seen.following(seen.layer + 1).weights
        return seen.only(best(rows.mean(0)[-1], seen.visual, counts[seen.layer + 1]))

    return rule


def sparsevlm(counts: dict[int, int], version: str, voting: int, summed: bool = False) -> Rule:
    """3.3, 3.5 (summed: as the paper) and 3.7."""

    def rule(seen: Seen) -> Slots | None:
        if seen.layer + 1 not in counts:
            return None
        raters = [i for i, is_rater in enumerate(seen.rater) if is_rater]
        votes = seen.weights[:, raters]
        if version == "2.0":
            cos, sin = (table[:, : table.shape[1] // 2] for table in seen.tables)
            favour = torch.zeros(len(raters), len(seen.kind))
            for row, i in enumerate(raters):
                for j in range(len(seen.kind)):
                    across = cos[i] * cos[j] + sin[i] * sin[j]  # cos((i - j) theta)
                    favour[row, j] = max(2 * float(across.sum()) / (2 * len(cos[0])) ** 0.5, 0.1)
            votes = votes / favour
            strength = votes[:, :, seen.visual].sum((1, 2))
            votes = votes[best(strength, list(range(len(strength))), voting)]
        score = votes.mean((0, 1))
        kept = best(score, seen.visual, min(counts[seen.layer + 1], len(seen.visual) - 1))
        slots = seen.only(kept)
        if version == "2.0":
            return slots
        dropped = [i for i in seen.visual if i not in kept]
        found = clusters(seen.x, best(score, dropped, int(0.3 * len(dropped)) + 1), summed)
        behind = max(i for i, (own, _) in enumerate(slots) if seen.kind[own] != BEHIND) + 1
        new = [
            (own, dict.fromkeys(members, 1.0 if summed else 1 / len(members)))
            for own, members in found
        ]
        return [*slots[:behind], *new, *slots[behind:]]

    return rule


def clusters(x: Tensor, tokens: list[int], cosine: bool) -> list[tuple[int, list[int]]]:
    """3.5 items 2 and 3: density peaks; centres in sequence order, each with its members."""
    count = len(tokens) // 10 + 1
    far = {i: {j: float((x[i] - x[j]).norm()) / x.shape[1] ** 0.5 for j in tokens} for i in tokens}
    dense = {}
    for i in tokens:
        near = sorted(far[i].values())[:count]
        dense[i] = float(torch.tensor([-sum(d * d for d in near) / count]).exp())
    gap = {}
    for i in tokens:
        higher = [far[i][j] for j in tokens if dense[j] > dense[i]]
        gap[i] = min(higher) if higher else max(max(row.values()) for row in far.values())
    centres = sorted(sorted(tokens, key=lambda i: -dense[i] * gap[i])[:count])
    members: dict[int, list[int]] = {centre: [centre] for centre in centres}
    for i in tokens:
        if i not in centres:
            likeness = {c: float(F.cosine_similarity(x[i], x[c], 0)) for c in centres}
            members[min(centres, key=lambda c: -likeness[c] if cosine else far[i][c])].append(i)
    return sorted(members.items())


def lightkv(
    stages: dict[int, tuple[int, float]], axis: str | None, places: Plain | None = None
) -> Rule:
    """6.2 and 6.3: windows per side and ratio of each stage, by its first short layer.

    Without an axis all weigh alike; ``places`` says where tokens stand for the true geometry.
    """

    def rule(seen: Seen) -> Slots | None:
        if seen.layer + 1 not in stages:
            return None
        sides, ratio = stages[seen.layer + 1]
        shares = seen.logits.softmax(1 if axis == "query" else 2)
        text = [i for i, kind in enumerate(seen.kind) if kind != VISUAL]
        xi = shares[:, :, text].sum((0, 2)) if axis else torch.ones(len(seen.kind))
        into: dict[int, list[int]] = {}
        for window in windows(seen.visual, sides, places and places.places[-1]):
            sources, targets = window[::2], window[1::2]
            like = {
                a: {b: float(F.cosine_similarity(seen.x[a], seen.x[b], 0)) for b in targets}
                for a in sources
            }
            nearest = {a: max(targets, key=lambda b: like[a][b]) for a in sources if targets}
            order = sorted(nearest, key=lambda a: -like[a][nearest[a]])
            for a in order[: min(int(ratio * len(window)), len(window) // 2)]:
                into.setdefault(nearest[a], []).append(a)
        gone = {a for sources in into.values() for a in sources}
        slots: Slots = []
        for i in range(len(seen.kind)):
            if i not in gone:
                mixed = [i, *into.get(i, [])]
                total = float(xi[mixed].sum())
                slots.append((i, {a: float(xi[a]) / total if i in into else 1.0 for a in mixed}))
        return slots

    return rule


def windows(tokens: list[int], sides: int, places: list[int] | None = None) -> list[list[int]]:
    """6.2 item 1: a raster of the nearest square, whose first rows and columns are longer.

    With places: the raster of the picture, 6 x 6.
    """
    side = isqrt(len(tokens))
    side += side * side < len(tokens)
    side = 6 if places else side
    edges, edge = [], 0
    for part in range(sides):
        edges.append(edge)
        edge += side // sides + (part < side % sides)
    found: dict[tuple[int, int], list[int]] = {}
    for number, token in zip(places or range(len(tokens)), tokens, strict=True):
        row, column = divmod(number, side)
        cell = (max(p for p in edges if p <= row), max(p for p in edges if p <= column))
        found.setdefault(cell, []).append(token)
    return list(found.values())


def twig(plain: Plain, method: Any, count: int, gated: bool) -> Rule:
    """7.2, and 7.6 with gates: behind layer K - 1; nothing visual from layer K_f on."""

    def rule(seen: Seen) -> Slots | None:
        if seen.layer + 1 == method.wiped:
            return seen.only([])
        if seen.layer + 1 != method.first:
            return None
        last = plain.grown(method.branch.layers, method.first, seen)
        row = last.weights.mean(0)[-1]
        if gated:
            head = method.parts["pruning_head"]

            def gate(weight: Tensor, like: Tensor) -> Tensor:
                raised = last.inputs @ weight.T
                return (raised.relu() * raised.sigmoid()).view_as(like)

            query = (last.query * gate(head.query.weight, last.query))[-1]
            key = last.key * gate(head.key.weight, last.key)
            key = key.repeat_interleave(len(query) // key.shape[1], 1)[seen.visual]
            shares = (torch.einsum("hd,khd->hk", query, key) / key.shape[-1] ** 0.5).softmax(-1)
            row = torch.zeros(len(seen.kind))
            row[seen.visual] = shares.mean(0)
        return seen.only(best(row, seen.visual, count))

    return rule


def explainc(count: int) -> Rule:
    """8.6 with raw attention: layer 0, mean over heads and the text behind the picture."""

    def rule(seen: Seen) -> Slots | None:
        behind = [i for i, kind in enumerate(seen.kind) if kind == BEHIND]
        return seen.only(best(seen.weights.mean(0)[behind].mean(0), seen.visual, count))

    return rule
