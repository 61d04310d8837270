"""QueCC: query-based convolutional cross-attention (arXiv 2411.03312).

From spec abstractive 3. The question, as the language model itself reads it, is added to the
picture's features; a depth-wise convolution with stride makes one query of each window of the
raster; each query attends to the keys and values of its own window, which come from several layers
of the tower. The tokens depend on the question, so only the tower's work is shared.

Decisions: one question per picture block, in a conversation the first (Q1). Port to Qwen3-VL (3.6):
keys and values come from the DeepStack taps and the merged output, so nothing is added by DeepStack
later; windows are those of adaptive pooling, to which the kernel is resized; the merger, which
projects, has already run. The tokens stand like a picture of as many tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from etcbench.compressor import Compressor, ModelSpec, Reuse
from etcbench.costs import Case
from etcbench.errors import BudgetError, UsageError
from etcbench.grids import cells, equal_sides, grid_within, require_one_raster
from etcbench.options import require_positive
from etcbench.released import LLAVA_LANGUAGE, LLAVA_TOWER, TOWER, KeyMap
from etcbench.states import Questions, Resampled, VisionStates
from etcbench.window_attention import WindowAttention

CANONICAL = 32  # side of the raster for which a kernel is sized where pictures have any shape


@dataclass(eq=False)
class QueCC(Compressor):
    """One token per window of the raster.

    Parameters
    ----------
    layers : str, optional
        Outputs of the tower that keys and values come from, as ``12-16-22-23`` of CLIP-L's 24
        layers (0: the input of the first); default: the same parts of the depth. Ports take the
        DeepStack taps.
    heads : int
        Heads of the attention.
    kernel : int, optional
        Side of the convolution's kernel; default: of a window.
    query : {"first", "each"}
        Which question of a training conversation makes the tokens: the first, for all turns
        (register Q1), or each turn's own, and the turns are trained apart.
    """

    query_aware: ClassVar[bool] = True
    trained: ClassVar[bool] = True
    resamples: ClassVar[bool] = True
    released: ClassVar[KeyMap] = KeyMap(
        {
            **LLAVA_LANGUAGE,
            **LLAVA_TOWER,
            "model.mm_projector.0.*": "compressor.*",
            "model.mm_projector.1.*": "model.model.multi_modal_projector.linear_1.*",
            "model.mm_projector.3.*": "model.model.multi_modal_projector.linear_2.*",
        },
        optional=(TOWER,),
    )

    layers: str | None = None
    heads: int = 8
    kernel: int | None = None
    query: Literal["first", "each"] = "first"

    def prepare(self, spec: ModelSpec) -> None:
        """Create the module; check that the budget is a raster of equal windows."""
        require_one_raster(self.name(), spec)
        assert self.budget is not None
        side = round(self.budget.tokens**0.5)
        raster = spec.grid[0] if spec.grid else CANONICAL
        if spec.grid and (side not in equal_sides(raster) or side**2 != self.budget.tokens):
            served = ", ".join(str(count**2) for count in equal_sides(raster))
            raise BudgetError(
                f"quecc cuts the {raster}x{raster} raster of {spec.name} into equal windows and "
                f"cannot make {self.budget.tokens} tokens; ask for {served}"
            )
        if self.kernel is None:
            self.kernel = max(raster // side, 1)
        require_positive("quecc", heads=self.heads, kernel=self.kernel)
        self.numbers = self._layer_numbers(spec)
        if spec.feature_width % self.heads:
            raise UsageError(
                f"quecc: {self.heads} heads do not divide the {spec.feature_width} features of "
                f"{spec.name}; say heads="
            )
        sources = 1 + spec.taps if spec.projected else len(self.numbers)
        self.attention = WindowAttention(spec, sources, self.heads, self.kernel).eval()

    def _layer_numbers(self, spec: ModelSpec) -> list[int]:
        depth = spec.tower_layers
        if self.layers is None:
            return [depth // 2, depth * 2 // 3, depth - 2, depth - 1]
        if spec.projected:
            raise UsageError(f"quecc: the tower of {spec.name} gives its taps; leave out layers")
        numbers = [int(part) if part.isdigit() else -1 for part in self.layers.split("-")]
        if not all(0 <= number <= depth for number in numbers):
            raise UsageError(
                f"quecc: layers={self.layers} is no list such as 0-2-{depth} of the {depth} layers "
                f"of {spec.name}'s tower"
            )
        return numbers

    @property
    def separate_turns(self) -> bool:
        """Where each has its own tokens."""
        return self.query == "each"

    @property
    def reuse(self) -> Reuse:
        """The tower's output."""
        return "vision"

    @property
    def module(self) -> nn.Module:
        """Everything between tower and projector."""
        return self.attention

    def projected(self, tokens: int) -> int:
        """Count what is made."""
        return self.schedule(tokens, 1)[0]

    def own_macs(self, case: Case) -> int:
        """Count the question's way through the language model, and the windows."""
        assert self.budget is not None
        windows = cells(case.grid, grid_within(self.budget.tokens, case.grid))
        places = max(len(down) * len(across) for down, across in windows)
        read = case.spec.layers * case.decoder_layer(case.question)
        return read + self.attention.macs(case.visual, len(windows), places)

    def resample(self, vision: VisionStates, questions: Questions) -> Resampled:
        """Cut each picture into windows and make a token of each."""
        assert self.budget is not None
        features, _ = vision.patches
        if vision.layer_features is None:
            sources = [*vision.deepstack, features]
        else:
            skipped = int(vision.has_cls)
            sources = [vision.layer_features(number)[:, skipped:] for number in self.numbers]
        coarse = [grid_within(self.budget.tokens, raster) for raster in vision.rasters]
        made = self.attention(features, torch.cat(sources, -1), questions.states(), vision, coarse)
        return Resampled(vision.project(made.to(features)), grid=torch.tensor(coarse))


METHOD = QueCC
