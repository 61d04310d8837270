"""Where a method keeps, merges and drops the tokens of one picture, stage by stage.

A `Trace` stands between the engine and a method, passes every question on to it and notes the
selections that come back. Selections are linear, so their product says of every token that is
left which raster places it holds and with what weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from etcbench.backbones import Backbone
from etcbench.checkpoints import installed
from etcbench.compressor import Compressor
from etcbench.doc import Doc, Picture
from etcbench.engine import Settings, answers
from etcbench.errors import UsageError
from etcbench.run import LoadedMethod
from etcbench.selection import Kind, Layout, Selection
from etcbench.states import LayerState, PromptState, VisionStates
from etcbench.task import Task

CACHED = "left in the cache"
MERGED = 1e-6  # smaller shares of a token are rounding


@dataclass(frozen=True)
class Stage:
    """What is left of a picture at one point.

    Attributes
    ----------
    label : str
        Where, e.g. ``"after layer 2"``.
    grid : tuple of int
        Raster (rows, columns) of the picture.
    tokens : int
        Visual tokens that are left.
    kept : tuple of int
        Raster places that stand for themselves.
    merged : dict of int to int
        Raster places that are part of another token, and the place that token stands at (-1: a
        token without a place of its own).
    heat : tuple of float or None
        Attention that learned tokens pay to each place, averaged over layers and heads.
    learned : int
        Learned tokens behind the picture.
    """

    label: str
    grid: tuple[int, int]
    tokens: int
    kept: tuple[int, ...]
    merged: dict[int, int]
    heat: tuple[float, ...] | None = None
    learned: int = 0

    @property
    def places(self) -> int:
        """Raster places of the picture."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Inspection:
    """One method on one picture and question.

    Attributes
    ----------
    title : str
        Method, or setting by its name, and budget.
    stages : tuple of Stage
        In the order of the picture's way through the model; the first is what enters the decoder
        or what a selection left before it.
    answer : str
        The method's answer.
    looks : bool
        Whether the method sees the picture at all.
    notes : tuple of str
        What a reader must know, e.g. ``"untrained"``.
    """

    title: str
    stages: tuple[Stage, ...]
    answer: str
    looks: bool = True
    notes: tuple[str, ...] = ()


class Trace:
    """A method that is watched; answers as the method does.

    Parameters
    ----------
    method : Compressor
        The method; it must be asked about one picture at a time.
    """

    def __init__(self, method: Compressor) -> None:
        self.method = method
        self.stages: list[Stage] = []
        self.grid = (0, 0)  # raster of the picture; none where a method makes tokens of its own
        self._weights = torch.zeros(0, 0)  # tokens left x raster places
        self._heat: list[Tensor] = []

    @property
    def places(self) -> int:
        """Raster places of the picture."""
        return self.grid[0] * self.grid[1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def select_vision(self, vision: VisionStates) -> Selection | None:
        """Pass on, and start the account of this picture."""
        self.grid = (int(vision.grid[0, 0]), int(vision.grid[0, 1]))
        selection = self.method.select_vision(vision)
        self._weights = torch.eye(self.places)
        if selection is not None:
            tokens = vision.features.shape[1]
            weights = selection.matrix(tokens)[0].float().cpu()
            own = selection.index[0].cpu() - int(vision.has_cls)
            self._weights = weights[:, int(vision.has_cls) :]
            self._note("in front of the projector", own)
        return selection

    def select_embeds(self, embeds: Tensor, grid: Tensor, keys: list[str]) -> Selection | None:
        """Pass on."""
        selection = self.method.select_embeds(embeds, grid, keys)
        if selection is not None:
            self._apply(selection.matrix(embeds.shape[1])[0].float().cpu())
            self._note("in front of the decoder", selection.index[0].cpu())
        return selection

    def select_prompt(self, state: PromptState) -> Selection | None:
        """Pass on; the question has taken part in what is in front of the decoder."""
        selection = self.method.select_prompt(state)
        if selection is not None:
            self._follow(selection, state.layout, "in front of the decoder")
        return selection

    def select_hidden(self, state: LayerState) -> Selection | None:
        """Pass on; a selection moves whole sequences, of which the visual part is followed."""
        selection = self.method.select_hidden(state)
        learned = state.layout.is_kind(Kind.LEARNED)
        visual = state.layout.is_kind(Kind.VISUAL)
        if learned.any() and visual.any():
            rows = learned[0].nonzero()[None, :, 0]
            shares = state.attention.weights(rows)[0].float().mean((0, 1))[visual[0]]
            self._heat.append(shares.cpu())
        if selection is not None:
            self._follow(selection, state.layout, f"after layer {state.layer + 1}")
        return selection

    def evict(self, layout: Layout) -> Selection | None:
        """Pass on; what leaves the cache leaves the picture."""
        selection = self.method.evict(layout)
        if selection is not None and CACHED not in {stage.label for stage in self.stages}:
            self._follow(selection, layout, CACHED)
        return selection

    def _follow(self, selection: Selection, layout: Layout, label: str) -> None:
        after = layout.select(selection)
        left = after.is_kind(Kind.VISUAL)[0].cpu()
        visual = layout.is_kind(Kind.VISUAL)[0].cpu()
        weights = selection.matrix(layout.tokens)[0].float().cpu()[left][:, visual]
        heat = None
        if self._heat and not left.any():
            heat = tuple((self._weights.T @ torch.stack(self._heat).mean(0)).tolist())
        self._apply(weights)
        own = after.place[0].cpu()[left]
        self._note(label, own, heat, int(after.is_kind(Kind.LEARNED).sum()))

    def _apply(self, weights: Tensor) -> None:
        self._weights = weights[:, : len(self._weights)] @ self._weights

    def _note(
        self,
        label: str,
        own: Tensor,
        heat: tuple[float, ...] | None = None,
        learned: int = 0,
    ) -> None:
        """Write down which places are left, given each token's own place."""
        kept = {int(place) for place in own if 0 <= place < self.places}
        merged: dict[int, int] = {}
        for token, weights in enumerate(self._weights):
            home = int(own[token]) if token < len(own) else -1
            for place in (weights.abs() > MERGED).nonzero()[:, 0].tolist():
                if place not in kept:
                    merged[place] = home if 0 <= home < self.places else -1
        kept_places = tuple(sorted(kept))
        stage = Stage(label, self.grid, len(self._weights), kept_places, merged, heat, learned)
        self.stages.append(stage)


class _Ask(Task):
    """One question as it was typed."""

    name = "question"
    styles = ("as typed",)

    def render(self, doc: Doc, style: str) -> str:
        """Take the question as it is."""
        return str(doc.fields["question"])


def inspect(
    backbone: Backbone,
    methods: Sequence[LoadedMethod],
    picture: Picture,
    question: str,
    titles: Sequence[str] | None = None,
) -> list[Inspection]:
    """Answer one question with several methods and follow the picture's tokens.

    Parameters
    ----------
    backbone : Backbone
        The model.
    methods : sequence of LoadedMethod
        From `load_compressor`.
    picture : Picture
        What is asked about.
    question : str
        User text, as the model is to read it.
    titles : sequence of str, optional
        What each method was asked for by; default its name and budget, which settings of one
        method may share.

    Raises
    ------
    UsageError
        If the picture cannot be read.
    """
    doc = Doc("0", "0", (picture,), {"question": question}, None)
    found = []
    for number, method in enumerate(methods):
        trace = Trace(method.compressor)
        watched = cast("Compressor", trace)
        settings = Settings(batch_size=1, reuse=False)
        with installed(method.compressor, backbone):
            answer = next(iter(answers(backbone, watched, _Ask(), [doc], settings)))[0]
        if answer.response is None:
            raise UsageError(f"{method.compressor.name()}: {answer.error}")
        budget = method.compressor.budget
        name = " ".join(filter(None, (method.compressor.name(), str(budget or ""))))
        title = name if titles is None else titles[number]
        marks = ("untrained",) if "untrained" in method.weights else ()
        found.append(
            Inspection(
                title,
                tuple(trace.stages) or _untouched(trace),
                answer.response,
                method.compressor.uses_image,
                marks,
            )
        )
    return found


def _untouched(trace: Trace) -> tuple[Stage, ...]:
    """Give the one stage of a method that selects nothing: its raster, or no picture at all."""
    if not trace.places:
        return ()
    return (Stage("every layer", trace.grid, trace.places, tuple(range(trace.places)), {}),)
