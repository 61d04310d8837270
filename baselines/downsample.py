"""A smaller picture: the control that spends a budget on resolution alone."""

from __future__ import annotations

from dataclasses import dataclass

from etcbench.compressor import Compressor, ModelSpec
from etcbench.grids import grid_within, require_coarse_grid


@dataclass(eq=False)
class Downsample(Compressor):
    """Shrink the picture until the tower itself makes no more tokens than the budget.

    The tower runs on the smaller picture with its position table interpolated, so the vision
    tower gets cheaper too. Samples that this control answers correctly do not need the detail
    that a compressor claims to preserve.
    """

    def prepare(self, spec: ModelSpec) -> None:
        """Check that the budget is a raster."""
        assert self.budget is not None
        require_coarse_grid(self.name(), self.budget, spec)

    def image_grid(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        """Raster of the smaller picture."""
        assert self.budget is not None
        smaller = grid_within(self.budget.of(grid[0] * grid[1]), grid)
        return None if smaller == grid else smaller


METHOD = Downsample
