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
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from etcbench.compressor import Compressor, ModelSpec, Reuse
from etcbench.errors import BudgetError, UsageError
from etcbench.grids import cells, grid_within
from etcbench.released import LLAVA_LANGUAGE, LLAVA_TOWER, TOWER, KeyMap
from etcbench.states import Questions, Resampled, VisionStates

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

    def prepare(self, spec: ModelSpec) -> None:
        """Create the module; check that the budget is a raster of equal windows."""
        assert self.budget is not None
        side = round(self.budget.tokens**0.5)
        if spec.grid is not None:
            served = [n * n for n in range(spec.grid[0], 0, -1) if spec.grid[0] % n == 0]
            if self.budget.tokens not in served:
                raise BudgetError(
                    f"quecc cuts the {spec.grid[0]}x{spec.grid[1]} raster of {spec.name} into "
                    f"equal windows and cannot make {self.budget.tokens} tokens; ask for "
                    f"{', '.join(map(str, served))}"
                )
        self.kernel = self.kernel or max((spec.grid[0] if spec.grid else CANONICAL) // side, 1)
        self.numbers = self._layer_numbers(spec)
        if spec.feature_width % self.heads:
            raise UsageError(f"quecc: {self.heads} heads do not divide {spec.feature_width}")
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
    def reuse(self) -> Reuse:
        """The tower's output."""
        return "vision"

    @property
    def module(self) -> nn.Module:
        """Everything between tower and projector."""
        return self.attention

    def schedule(self, visual_tokens: int, layers: int) -> list[int]:
        """Every layer holds one token per window."""
        assert self.budget is not None
        return [min(self.budget.tokens, visual_tokens)] * layers

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


class WindowAttention(nn.Module):
    """A query from each window of the raster, and its attention within the window.

    No position embedding, no residual, no norm behind the attention (spec abstractive 3.2).

    Parameters
    ----------
    spec : ModelSpec
        The backbone.
    sources : int
        Features joined into keys and values.
    heads, kernel : int
        Attention heads; side of the convolution's kernel.
    """

    def __init__(self, spec: ModelSpec, sources: int, heads: int, kernel: int) -> None:
        super().__init__()
        width = spec.feature_width

        def mlp(inputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(inputs, width),
                nn.GELU(),
                nn.Linear(width, width),
                nn.LayerNorm(width, eps=1e-6),
            )

        self.text_projection = nn.Sequential(
            nn.Linear(spec.hidden, width), nn.LayerNorm(width, eps=1e-6)
        )
        self.q_proj, self.k_proj, self.v_proj = (
            mlp(width),
            mlp(sources * width),
            mlp(sources * width),
        )
        self.q_downsample = nn.Conv2d(width, width, kernel, stride=kernel, groups=width)
        self.clip_attn = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(
        self,
        features: Tensor,
        sources: Tensor,
        question: Tensor,
        vision: VisionStates,
        coarse: list[tuple[int, int]],
    ) -> Tensor:
        """Make tokens, (pictures, tokens, width), padded on the right.

        Queries are made of ``features`` (pictures, patches, width) and ``question`` (pictures,
        hidden), keys and values of ``sources`` (pictures, patches, sources * width).
        """
        kind = self.q_proj[0].weight.dtype
        first, members = vision.distinct
        text = self.text_projection(question.to(kind))
        query = self.q_proj(features.to(kind) + text[:, None])
        key, value = (part(sources[first].to(kind))[members] for part in (self.k_proj, self.v_proj))
        out = query.new_zeros(len(query), max(h * w for h, w in coarse), query.shape[-1])
        shapes = list(zip(vision.rasters, coarse, strict=True))
        for pair in dict.fromkeys(shapes):
            rows = torch.tensor([shape == pair for shape in shapes])
            made = self._attended(query[rows], key[rows], value[rows], pair)
            out[rows, : made.shape[1]] = made.to(out)
        return out

    def _attended(
        self, query: Tensor, key: Tensor, value: Tensor, shapes: tuple[tuple[int, int], ...]
    ) -> Tensor:
        """Attend within the windows of pictures of one raster."""
        index, kernel = self._windows(*shapes)
        taken = index.clamp_min(0)
        down = (query[:, taken] * kernel).sum(2) + self.q_downsample.bias
        absent = (index < 0).repeat(len(query), 1) if bool((index < 0).any()) else None
        out, _ = self.clip_attn(
            down.flatten(0, 1)[:, None],
            key[:, taken].flatten(0, 1),
            value[:, taken].flatten(0, 1),
            key_padding_mask=absent,
            need_weights=False,
        )
        return out.view(down.shape)

    def _windows(self, raster: tuple[int, int], coarse: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Places in each window, (windows, places), -1 for none, and the kernel over them.

        The kernel is resized where a window has another shape, and keeps its sum.
        """
        weight = self.q_downsample.weight.transpose(0, 1)
        places, kernels = [], []
        for down, across in cells(raster, coarse):
            places.append(torch.tensor([y * raster[1] + x for y in down for x in across]))
            shape, resized = (len(down), len(across)), weight
            if shape != weight.shape[-2:]:
                resized = F.interpolate(weight, shape, mode="bilinear", align_corners=False)
                resized = resized * (weight[0, 0].numel() / resized[0, 0].numel())
            kernels.append(resized[0].flatten(1).T)
        index = pad_sequence(places, batch_first=True, padding_value=-1).to(weight.device)
        return index, pad_sequence(kernels, batch_first=True)


METHOD = QueCC
