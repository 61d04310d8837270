"""LightKV: merge similar visual tokens within windows between decoder layers.

From spec selective 6. Training-free. Decisions of its register: a listed layer still runs on the
full sequence (11.11, as the code), a stage merges ``ratio * n`` tokens, the text's attention
weighs the mixture, softmax over the queries. Weighted means are computed in fp32.

The published setting is the list 12-18-24. Budgets in tokens are extrapolations (6.5): half of
the tokens merge at each stage, and the layers are the spec's where it has them (32 and 28 layers),
else the nearest that give the layer average to 5 % or one token. A stage with fewer than 8 * w^2
tokens of a picture is skipped; without an explicit list of windows w is lowered instead. At ratio
0.5 the surviving places are (almost) fixed; similarity decides who receives, the text by how much.
Generated tokens stand behind the uncompressed prompt in every layer, a gap in the deep ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from etcbench.compressor import ModelSpec, Reuse
from etcbench.costs import Case
from etcbench.errors import BudgetError, UsageError
from etcbench.merging import Axis, Guidance, equal_rows, merge, mixing_macs, mixing_weights
from etcbench.selection import Kind, Selection
from etcbench.stages import (
    TOKENS,
    Staged,
    Stages,
    check_layers,
    numbers,
    place_stages,
    scaled_layers,
)
from etcbench.states import LayerState
from etcbench.windows import Windows, chain

OFFICIAL = (12, 18, 24)
# Spec 6.5: first short layers by depth and by the budget's part of 576 tokens.
PLACES: dict[int, dict[int, tuple[int, ...]]] = {
    32: {192: (4, 10, 17), 128: (2, 4, 9), 64: (1, 2, 3, 4)},
    28: {192: (4, 8, 15), 128: (2, 3, 8), 64: (1, 2, 3, 4, 20)},
}


@dataclass(eq=False)
class LightKV(Staged):
    """Merge up to half of the visual tokens at each of a few layers.

    Parameters
    ----------
    layers : str, optional
        Layers behind which tokens merge, e.g. ``"12-18-24"``, in place of a budget.
    windows : str, optional
        Windows per side of the picture, stage by stage; default 4-2-1, then 1.
    ratios : str, optional
        Share of a window's tokens that disappears, stage by stage; default 0.5 each.
    first_short_layer : {"next", "listed"}
        Whether a layer of `layers` is the last one on the full sequence (as the code) or the
        first one on the short sequence (as the paper counts).
    guidance : {"prompt", "random", "uniform"}
        What weighs the mixture: attention between picture and text; noise, as the released
        LLaVA path; nothing.
    softmax_axis : {"query", "key"}
        Axis of the attention's softmax: as the code, or as usual.
    geometry : {"faithful", "true"}
        Windows over the remaining tokens laid out as a square, as the code; or over their places
        in the picture.
    seed : int
        Of the random guidance.
    """

    layers: str | None = None
    windows: str | None = None
    ratios: str | None = None
    first_short_layer: Literal["next", "listed"] = "next"
    guidance: Guidance = "prompt"
    softmax_axis: Axis = "query"
    geometry: Literal["faithful", "true"] = "faithful"
    seed: int = 0

    @classmethod
    def budget_in(cls, options: dict[str, Any]) -> bool:
        """Whether layers are listed."""
        return options.get("layers") is not None

    def prepare(self, spec: ModelSpec) -> None:
        """Read the lists; check the budget."""
        self.spec = spec
        grid = spec.grid if self.geometry == "true" else None
        sides = numbers(self.windows, int, "lightkv: windows")
        ratios = numbers(self.ratios, float, "lightkv: ratios")
        self.merging = Windows(grid, sides, ratios)
        check_layers(self.places, spec, "lightkv")
        if any(given and len(given) != len(self.places) for given in (sides, ratios)):
            raise UsageError("lightkv: windows and ratios go with layers, one for each of them")
        if not all(0 <= ratio <= 0.5 for ratio in ratios) or 0 in sides:
            raise UsageError("lightkv: ratios are within 0 and 0.5, windows at least 1")
        if self.geometry == "true" and grid is None:
            raise UsageError(f"lightkv: {spec.name} has no fixed raster; use geometry=faithful")
        if self.budget is not None and self.places:
            raise UsageError("lightkv: layers fix the counts; leave out --tokens")
        total = None if self.budget is None else self.budget.checked_at(spec)
        if self.budget is None or total is None:
            return
        inputs, asked = self.schedule(total, spec.layers), self.budget.of(total)
        averaged = self.budget.counted == "input"
        served = sum(inputs) / len(inputs) if averaged else inputs[-1]
        # Halves of one picture are hardly ever the exact share of the next.
        near = averaged or self.budget.share is not None
        if abs(served - asked) > near * max(1, 0.05 * asked):
            stages = len(scaled_layers(OFFICIAL, spec.layers))
            each = ", ".join(map(str, chain(self.merging, total, stages)))
            nearest = self.budget.alike(round(served), total)
            nearest = nearest if averaged else f"kept:{nearest} of {each}"
            raise BudgetError(
                f"lightkv: halving {total} tokens in {spec.layers} layers of "
                f"{spec.name} cannot make {self.budget}; the nearest is {nearest}"
            )

    @property
    def reuse(self) -> Reuse:
        """Weights that ignore the text leave the whole prefix to every question."""
        return "layers" if self.guidance == "prompt" else "prefix"

    @property
    def places(self) -> tuple[int, ...]:
        """First short layers of the options."""
        listed = numbers(self.layers, int, "lightkv: layers")
        return tuple(layer + (self.first_short_layer == "next") for layer in listed)

    def stages(self, visual_tokens: int, pictures: int = 1) -> Stages:
        """Stages of the options, or those nearest to the budget."""
        one, places = visual_tokens // pictures, self.places
        counts = chain(self.merging, one, len(places) or None)
        if self.budget is not None:
            tokens, depth = self.budget.at(one).tokens, self.spec.layers
            if self.budget.counted == "kept":
                stages = min(range(len(counts)), key=lambda n: abs(counts[n] - tokens))
                places = scaled_layers(OFFICIAL, depth)[:stages]
            else:
                part = min(PLACES[32], key=lambda n: abs(n / TOKENS - tokens / one))
                known = PLACES.get(depth, {}) if round(part * one / TOKENS) == tokens else {}
                near = scaled_layers(PLACES[32][part], depth)
                places = known.get(part) or place_stages(counts, tokens, depth, near)
        left = tuple(n * pictures for n in counts[1 : len(places) + 1])
        return Stages(0, places[: len(left)], left)

    def stage_macs(self, case: Case, layer: int) -> int:
        """Count the similarity of all tokens, and the attention that weighs the mixture."""
        tokens, stages = case.entered[layer], self.stages(case.visual).first_short
        if not self.merging.side(stages.index(layer + 1), tokens):
            return 0
        guide = mixing_macs(case, layer, self.guidance, self.softmax_axis)
        return tokens**2 * case.spec.hidden + guide

    def select_hidden(self, state: LayerState) -> Selection | None:
        """Merge the sources of every window into their destinations."""
        layout = state.layout
        visual = layout.is_kind(Kind.VISUAL)
        due = self._due(state, visual)
        if not any(due):
            return None
        heads, axis = self.spec.heads, self.softmax_axis
        weight = mixing_weights(state, visual, self.guidance, axis, heads, self.seed)
        total, gone = weight, torch.zeros_like(visual)
        pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        for stage, side in sorted({key for key in due if key is not None}):
            here = torch.tensor([key == (stage, side) for key in due], device=visual.device)
            for image in range(int(layout.image.max()) + 1):
                mine = visual & here[:, None] & (layout.image == image)
                for rows, index in equal_rows(mine):
                    row = rows[:, None].expand_as(index)
                    hidden, place = state.hidden[row, index], layout.place[row, index].long()
                    merged, target = self.merging.match(stage, side, hidden, place)
                    row, source, into = row[merged], index[merged], index.gather(1, target)[merged]
                    gone[row, source] = True
                    total = total.index_put((row, into), weight[row, source], accumulate=True)
                    pairs.append((row, source, into))
        terms = [(*pair, weight[pair[:2]] / total[pair[::2]]) for pair in pairs]
        return merge(layout.valid & ~gone, terms, weight / total)

    def _due(self, state: LayerState, visual: Tensor) -> list[tuple[int, int] | None]:
        """Stage and windows per side of each row; None where nothing merges behind this layer."""
        found: list[tuple[int, int] | None] = [None] * len(visual)
        for row, (tokens, pictures) in enumerate(state.original_counts()):
            places = self.stages(tokens, pictures).first_short if tokens else ()
            if state.layer + 1 in places:
                stage = places.index(state.layer + 1)
                present = state.layout.image[row, visual[row]].unique(return_counts=True)[1]
                if side := self.merging.side(stage, int(present.min())):
                    found[row] = (stage, side)
        return found


METHOD = LightKV
