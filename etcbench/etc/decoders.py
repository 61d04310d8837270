"""From the learned tokens' states to the mean of the target: four decoders (register E6).

All write onto one raster: the backbone's own, or a canonical one that is resampled to each
picture's where the number of visual tokens depends on the picture (register E7). None is part of
a checkpoint or of inference.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etcbench.compressor import ModelSpec
from etcbench.errors import UsageError
from etcbench.etc.method import ETC

QFORMER_BLOCKS, QFORMER_HEADS = 2, 8


def resample(values: Tensor, raster: tuple[int, int], grid: Tensor) -> Tensor:
    """Bring values on one raster to every picture's own, bilinearly.

    Parameters
    ----------
    values : Tensor, shape (batch or 1, rows * columns, width)
        On the raster, row by row.
    raster : tuple of int
        Rows, columns.
    grid : Tensor, long, shape (batch, 2)
        Raster of each picture.

    Returns
    -------
    Tensor
        Shape (batch, N, width), padded with zeros to the largest picture.
    """
    shapes = [(int(rows), int(columns)) for rows, columns in grid.tolist()]
    values = values.expand(len(shapes), -1, -1)
    if all(shape == raster for shape in shapes):
        return values
    planes = values.transpose(1, 2).unflatten(2, raster)
    out = values.new_zeros(len(shapes), max(r * c for r, c in shapes), values.shape[-1])
    for shape in sorted(set(shapes)):
        rows = torch.tensor([own == shape for own in shapes], device=values.device)
        resized = F.interpolate(planes[rows], shape, mode="bilinear", align_corners=False)
        out[rows, : shape[0] * shape[1]] = resized.flatten(2).transpose(1, 2)
    return out


class TargetDecoder(nn.Module):
    """Base: what every decoder is built from.

    Parameters
    ----------
    method : ETC
        The options.
    spec : ModelSpec
        The backbone.
    """

    def __init__(self, method: ETC, spec: ModelSpec) -> None:
        super().__init__()
        assert method.budget is not None
        self.raster = spec.grid or (method.canonical_grid, method.canonical_grid)
        self.tokens, self.hidden = method.budget.tokens, spec.hidden
        self.bias = nn.Parameter(torch.zeros(spec.hidden))

    @property
    def places(self) -> int:
        """Places of the raster."""
        return self.raster[0] * self.raster[1]

    @abstractmethod
    def decode(self, learned: Tensor, grid: Tensor) -> Tensor:
        """Reconstruct the visual states up to the common bias; see `forward`."""

    def forward(self, learned: Tensor, grid: Tensor) -> Tensor:
        """Reconstruct the visual states.

        Parameters
        ----------
        learned : Tensor, shape (batch, M, D)
            Hidden states of the learned tokens.
        grid : Tensor, long, shape (batch, 2)
            Raster of each picture.

        Returns
        -------
        Tensor
            Shape (batch, N, D); places beyond a picture are not meaningful.
        """
        return self.decode(learned.to(self.bias.dtype), grid) + self.bias


class BottleneckDecoder(TargetDecoder):
    """Two-layer MLP of width ``rank`` from all of Z to all of V: about 20 M parameters at 7B."""

    def __init__(self, method: ETC, spec: ModelSpec) -> None:
        super().__init__(method, spec)
        self.down = nn.Linear(self.tokens * self.hidden, method.rank)
        self.up = _small(nn.Linear(method.rank, self.places * self.hidden))

    def decode(self, learned: Tensor, grid: Tensor) -> Tensor:
        """Map vec(Z) to ``rank`` numbers and those to the raster."""
        flat: Tensor = self.up(F.gelu(self.down(learned.flatten(1))))
        return resample(flat.unflatten(1, (self.places, self.hidden)), self.raster, grid)


class OuterProductDecoder(TargetDecoder):
    """``rank`` row vectors per learned token, mixed by a learned basis over the raster."""

    def __init__(self, method: ETC, spec: ModelSpec) -> None:
        super().__init__(method, spec)
        self.vectors = nn.Sequential(
            nn.Linear(self.hidden, method.decoder_width),
            nn.GELU(),
            _small(nn.Linear(method.decoder_width, method.rank * self.hidden)),
        )
        width = self.tokens * method.rank
        self.basis = nn.Parameter(torch.randn(1, self.places, width) * width**-0.5)

    def decode(self, learned: Tensor, grid: Tensor) -> Tensor:
        """Multiply the basis (N x M rank) with the row vectors (M rank x D)."""
        vectors = self.vectors(learned).unflatten(2, (-1, self.hidden)).flatten(1, 2)
        return resample(self.basis, self.raster, grid) @ vectors


class QFormerDecoder(TargetDecoder):
    """Position queries that look at Z, in two blocks, then a linear map to D."""

    def __init__(self, method: ETC, spec: ModelSpec) -> None:
        super().__init__(method, spec)
        width = method.decoder_width
        if width % QFORMER_HEADS:
            raise UsageError(f"etc: decoder_width is a multiple of {QFORMER_HEADS}, not {width}")
        self.queries = nn.Parameter(torch.randn(1, self.places, width) * 0.02)
        self.entry = nn.Linear(self.hidden, width)
        self.blocks = nn.ModuleList([_CrossBlock(width) for _ in range(QFORMER_BLOCKS)])
        self.exit = nn.Sequential(nn.LayerNorm(width), _small(nn.Linear(width, self.hidden)))

    def decode(self, learned: Tensor, grid: Tensor) -> Tensor:
        """Let each place of the picture query Z."""
        states, memory = resample(self.queries, self.raster, grid), self.entry(learned)
        for block in self.blocks:
            states = block(states, memory)
        decoded: Tensor = self.exit(states)
        return decoded


class _CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, QFORMER_HEADS, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, states: Tensor, memory: Tensor) -> Tensor:
        """Attend to ``memory``, shape (batch, M, width), from each of ``states``."""
        seen, _ = self.attention(self.before(states), memory, memory, need_weights=False)
        states = states + seen
        out: Tensor = states + self.mlp(self.between(states))
        return out


class InterpolationDecoder(TargetDecoder):
    """Z stretched along the token axis from M to N: a constant for M = 1."""

    def __init__(self, method: ETC, spec: ModelSpec) -> None:
        super().__init__(method, spec)
        self.map: nn.Module = nn.Identity()
        if method.decoder_projection:
            self.map = _small(nn.Linear(self.hidden, self.hidden))

    def decode(self, learned: Tensor, grid: Tensor) -> Tensor:
        """Interpolate linearly, to each picture's own number of tokens."""
        columns = self.map(learned).transpose(1, 2)
        counts = grid.prod(-1).tolist()
        rows = [
            F.interpolate(column[None], count, mode="linear", align_corners=False)[0].T
            for column, count in zip(columns, counts, strict=True)
        ]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _small(layer: nn.Linear) -> nn.Linear:
    """Start a last layer near zero, so that what it adds to the target's mean starts small."""
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


DECODERS: dict[str, type[TargetDecoder]] = {
    "bottleneck": BottleneckDecoder,
    "outer_product": OuterProductDecoder,
    "qformer": QFormerDecoder,
    "linear_interpolation": InterpolationDecoder,
}
