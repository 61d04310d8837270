"""Budgets of methods that drop visual tokens in several layers.

Published settings are lists of layers and counts for 32 layers and 576 tokens. On another shape
layers scale with the depth (rounded, at least 1, strictly increasing, those past the end left
out) and counts with the tokens. The counts are taken as they are where the budget is the same
fraction of the tokens as a published one and the decoder has at least 24 layers, which keeps the
stages apart; otherwise all are multiplied by one factor, found so that the layer-averaged input
count is the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from etcbench.compressor import Budget, Compressor, ModelSpec, Numbering, Reuse
from etcbench.costs import Case
from etcbench.errors import BudgetError, UsageError
from etcbench.states import LayerState

LAYERS, TOKENS, DEEP = 32, 576, 24
Left = Callable[[int, int], int]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Stages:
    """Where a method drops, and to how many.

    Attributes
    ----------
    tokens : int
        The budget under which it is known.
    first_short : tuple of int
        Layers that are the first to run on a shorter sequence.
    counts : tuple of int
        Visual tokens that each stage is asked to keep.
    """

    tokens: int
    first_short: tuple[int, ...]
    counts: tuple[int, ...]

    def inputs(self, visual_tokens: int, layers: int, left: Left = min) -> list[int]:
        """Count the visual tokens at each layer's input.

        ``left(present, count)`` says how many a stage leaves of those present.
        """
        found, present = [visual_tokens] * layers, visual_tokens
        for layer, count in zip(self.first_short, self.counts, strict=True):
            present = left(present, count)
            found[layer:] = [present] * (layers - layer)
        return found


def scaled_layers(first_short: Sequence[int], layers: int) -> tuple[int, ...]:
    """Scale layer numbers from 32 layers to ``layers``."""
    found: list[int] = []
    for layer in first_short:
        found.append(max(int(layer * layers / LAYERS + 0.5), found[-1] + 1 if found else 1))
    return tuple(layer for layer in found if layer < layers)


@lru_cache(maxsize=4096)
def solve(
    published: tuple[Stages, ...], budget: Budget, visual_tokens: int, layers: int, left: Left
) -> Stages:
    """Find the stages for a budget: published ones, or the nearest of them scaled to it.

    Parameters
    ----------
    published : tuple of Stages
        For 32 layers and 576 tokens.
    budget : Budget
        The layer average, or what is left at the end.
    visual_tokens, layers : int
        Tokens of the picture, decoder layers.
    left : callable
        See `Stages.inputs`.

    Returns
    -------
    Stages
        Without any where the budget keeps everything; with a single token each where the budget
        is too small for the layers in front of the first stage.
    """
    tokens = budget.tokens
    if tokens >= visual_tokens:
        return Stages(tokens, (), ())
    size = visual_tokens / TOKENS
    averaged = budget.counted == "input"
    near = min(
        published, key=lambda row: abs((row.tokens if averaged else row.counts[-1]) * size - tokens)
    )
    places = scaled_layers(near.first_short, layers)

    def scaled(factor: float) -> Stages:
        counts = [min(max(round(factor * size * n), 1), visual_tokens) for n in near.counts]
        return Stages(tokens, places, tuple(counts[: len(places)]))

    def measured(factor: float) -> float:
        inputs = scaled(factor).inputs(visual_tokens, layers, left)
        return sum(inputs) / layers if averaged else inputs[-1]

    published_here = averaged and layers >= DEEP and round(near.tokens * size) == tokens
    if published_here or measured(1) == tokens:
        return scaled(1)
    low, high = 0.0, float(TOKENS)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if measured(middle) < tokens else (low, middle)
    return scaled(min(low, high, key=lambda factor: abs(measured(factor) - tokens)))


@lru_cache(maxsize=4096)
def place_stages(
    chain: tuple[int, ...], tokens: int, layers: int, reference: tuple[int, ...]
) -> tuple[int, ...]:
    """Find layers for stages whose counts are fixed, so that the layer average is a budget.

    Parameters
    ----------
    chain : tuple of int
        Tokens at the beginning and after each possible stage.
    tokens, layers : int
        The budget; the decoder's depth.
    reference : tuple of int
        First short layers whose proportions are wanted.

    Returns
    -------
    tuple of int
        First short layers, possibly fewer or more than in ``reference``; the nearest there are.
    """
    if tokens >= chain[0]:
        return ()

    def error(places: Sequence[int]) -> float:
        inputs = Stages(tokens, tuple(places), chain[1 : len(places) + 1]).inputs(chain[0], layers)
        return abs(sum(inputs) / layers - tokens)

    def nearest(count: int) -> tuple[int, ...]:
        shape = [*reference, *(reference[-1] + n for n in range(1, count + 1))][:count]
        found = tuple(range(1, count + 1))
        for last in range(count, layers) if count else ():
            places: list[int] = []
            for number, layer in enumerate(shape):
                low = places[-1] + 1 if places else 1
                high = layers - count + number
                places.append(min(max(round(layer * last / shape[-1]), low), high))
            found = min(found, tuple(places), key=error)
        while True:
            moved = (
                (*found[:n], found[n] + by, *found[n + 1 :])
                for n in range(count)
                for by in (-1, 1)
                if 0 < found[n] + by < layers and found[n] + by not in found
            )
            better = min(moved, key=error, default=found)
            if error(better) >= error(found):
                return found
            found = better

    counts = sorted(range(min(len(chain), layers)), key=lambda n: abs(n - len(reference)))
    candidates = []
    for count in counts:
        candidates.append(nearest(count))
        if error(candidates[-1]) <= max(1, 0.02 * tokens):
            return candidates[-1]
    return min(candidates, key=error)


def kept_of(present: int, count: int) -> int:
    """Tokens a stage leaves without recycling: at least one is dropped, at least one stays."""
    return max(min(count, present - 1), 1)


def recycled(dropped: int) -> tuple[int, int]:
    """Candidates for merging among the dropped tokens, and their clusters (spec 3.5)."""
    candidates = int(0.3 * dropped) + 1
    return candidates, candidates // 10 + 1


def kept_and_merged(present: int, count: int) -> int:
    """Tokens a stage leaves with recycling."""
    kept = kept_of(present, count)
    return kept + (recycled(present - kept)[1] if present > kept else 0)


def numbers(text: str | None, kind: type[Number], what: str) -> tuple[Number, ...]:
    """Read a list such as ``"8-16-24"`` or ``"0.5-0.25"``; None is empty.

    Raises
    ------
    UsageError
        If it is not a list of such numbers.
    """
    try:
        return tuple(kind(part) for part in text.split("-")) if text is not None else ()
    except ValueError:
        example = "8-16-24" if kind is int else "0.5-0.25-0.125"
        raise UsageError(f"{what} is a list like {example}, not {text!r}") from None


def check_layers(layers: Sequence[int], spec: ModelSpec, what: str) -> None:
    """Refuse layers that do not increase or that the decoder does not have."""
    increasing = all(a < b for a, b in pairwise(layers))
    if layers and not (increasing and 1 <= layers[0] <= layers[-1] < spec.layers):
        raise UsageError(f"{what}: layers increase from 1 to {spec.layers - 1} on {spec.name}")


@dataclass(eq=False)
class Staged(Compressor):
    """A method that shortens the sequence behind several decoder layers.

    Parameters
    ----------
    positions : {"auto", "keep", "reindex"}
        What becomes of the survivors' positions; ``"auto"``: as the method's authors do under 1-D
        positions, kept under M-RoPE (spec selective 1.10).
    """

    query_aware: ClassVar[bool] = True

    positions: Literal["auto", "keep", "reindex"] = "auto"

    def prepare(self, spec: ModelSpec) -> None:
        """Check the budget against layers in front of the first stage."""
        self.spec = spec
        self._known: tuple[Sequence[tuple[int, int]], dict[int, list[int | None]]] = ((), {})
        if self.budget is None:
            return
        total = self.budget.checked_at(spec)
        if total is None and self.budget.counted == "kept":
            total = TOKENS  # what the last stage can leave does not depend on the picture
        if total is None:
            return
        stages = self.stages(total)
        inputs = stages.inputs(total, spec.layers, self.left)
        average, last = sum(inputs) / spec.layers, inputs[-1]
        reached = average if self.budget.counted == "input" else last
        if set(stages.counts) == {1} and reached > self.budget.of(total):
            served = (self.budget.alike(tokens, total) for tokens in (ceil(average), total))
            raise BudgetError(
                f"{self.name()}: {total} tokens in front of its first drop on {spec.name} "
                f"({spec.layers} layers) leave no room for {self.budget}; it can serve "
                f"{' to '.join(served)}, or kept:{last} and up"
            )

    @property
    def places(self) -> tuple[int, ...]:
        """First short layers that the options list; empty where the budget decides."""
        return ()

    @property
    def published(self) -> tuple[Stages, ...]:
        """Settings for 32 layers and 576 tokens; by default any first stage is possible."""
        return (Stages(0, (1,), ()),)

    @property
    def left(self) -> Left:
        """How many tokens a stage leaves of those present when asked to keep a count."""
        return min

    @property
    def reuse(self) -> Reuse:
        """The layers in front of the first stage."""
        return "layers"

    @property
    def numbering(self) -> Numbering:
        """Anew at each stage, or as `positions` says."""
        if self.positions != "auto":
            return self.positions
        return "reindex" if self.spec.planes == 1 else "keep"

    @property
    def shared_layers(self) -> int:
        """Layers in front of the first stage."""
        if self.places:
            return self.places[0]
        if self.spec.visual_tokens is not None:
            first = self.stages(self.spec.visual_tokens).first_short
            return first[0] if first else self.spec.layers
        return min(scaled_layers(row.first_short, self.spec.layers)[0] for row in self.published)

    def stages(self, visual_tokens: int, pictures: int = 1) -> Stages:
        """Stages for a prompt with so many visual tokens in so many pictures."""
        assert self.budget is not None
        budget = self.budget.at(visual_tokens, pictures)
        return solve(self.published, budget, visual_tokens, self.spec.layers, self.left)

    def schedule(self, visual_tokens: int, layers: int) -> list[int]:
        """All tokens before the first stage, then what each stage leaves."""
        return self.stages(visual_tokens).inputs(visual_tokens, layers, self.left)

    def own_macs(self, case: Case) -> int:
        """Sum what is computed behind each layer that ends a stage."""
        return sum(
            self.stage_macs(case, place - 1) for place in self.stages(case.visual).first_short
        )

    def stage_macs(self, case: Case, layer: int) -> int:
        """Count what the method computes behind a layer (`Compressor.own_macs`)."""
        return 0

    def wanted(self, state: LayerState) -> list[int | None] | None:
        """Count each row is asked to keep behind this layer: None where it has no stage here."""
        rows = state.original_counts()
        if rows != self._known[0]:  # asked behind every layer of a batch
            self._known = rows, self._counts_behind(rows)
        return self._known[1].get(state.layer + 1)

    def _counts_behind(self, rows: Sequence[tuple[int, int]]) -> dict[int, list[int | None]]:
        """Find each row's counts by first short layer."""
        found: dict[int, list[int | None]] = {}
        for number, (tokens, pictures) in enumerate(rows):
            stages = self.stages(tokens, pictures) if tokens else Stages(0, (), ())
            for place, count in zip(stages.first_short, stages.counts, strict=True):
                found.setdefault(place, [None] * len(rows))[number] = count
        return found

    def limits(self, wanted: list[int | None], visual: Tensor) -> Tensor:
        """Fill in what `wanted` leaves open: all tokens present; long, shape (batch,)."""
        asked = torch.tensor([-1 if k is None else k for k in wanted], device=visual.device)
        return torch.where(asked < 0, visual.sum(-1), asked)
