"""QueCC's module: a query from each window of the raster, which looks at its window only.

The question is added to the features before a depth-wise convolution with stride makes one query
of each window (spec abstractive 3.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from etcbench.compressor import ModelSpec
from etcbench.costs import matrix_macs
from etcbench.grids import cells
from etcbench.states import VisionStates


class WindowAttention(nn.Module):
    """A query from each window of the raster, and its attention within the window.

    No position embedding, no residual, no norm behind the attention (spec abstractive 3.2).
    Keys and values are made of ``sources`` features; the convolution's kernel has side ``kernel``.
    """

    def __init__(self, spec: ModelSpec, sources: int, heads: int, kernel: int) -> None:
        super().__init__()
        width = spec.feature_width

        def normed(*layers: nn.Module) -> nn.Sequential:
            return nn.Sequential(*layers, nn.LayerNorm(width, eps=1e-6))

        self.text_projection = normed(nn.Linear(spec.hidden, width))
        self.q_proj, self.k_proj, self.v_proj = (
            normed(nn.Linear(count * width, width), nn.GELU(), nn.Linear(width, width))
            for count in (1, sources, sources)
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
        kind = self.clip_attn.out_proj.weight.dtype
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

    def macs(self, patches: int, windows: int, places: int) -> int:
        """Count the multiply-accumulates on windows of so many places."""
        width = self.clip_attn.embed_dim
        mlps = (self.q_proj, self.k_proj, self.v_proj)
        ahead = matrix_macs(self.text_projection, 1) + sum(matrix_macs(m, patches) for m in mlps)
        return ahead + windows * width * (2 * width + 2 * places * width + 2 * places)

    def _attended(
        self, query: Tensor, key: Tensor, value: Tensor, shapes: tuple[tuple[int, int], ...]
    ) -> Tensor:
        """Attend within the windows of pictures of one raster."""
        index, kernel = self._windows(*shapes)
        taken = index.clamp_min(0)
        assert self.q_downsample.bias is not None
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
