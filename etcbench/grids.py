"""Rasters of visual tokens: which coarser ones a budget can be served with."""

from __future__ import annotations

import math

from etcbench.compressor import Budget, ModelSpec
from etcbench.errors import BudgetError


def coarse_grid(tokens: int, grid: tuple[int, int]) -> tuple[int, int] | None:
    """Find the raster of exactly ``tokens`` cells whose shape is nearest to that of ``grid``.

    Only rasters are considered that are no finer than ``grid`` on either side and whose cells
    are at most twice as long as wide; None if there is none.
    """
    rows, columns = grid
    best: tuple[float, tuple[int, int]] | None = None
    for height in range(1, rows + 1):
        width, rest = divmod(tokens, height)
        if rest or not 1 <= width <= columns:
            continue
        skew = abs(math.log2((rows / height) / (columns / width)))
        if skew <= 1 and (best is None or skew < best[0]):
            best = (skew, (height, width))
    return best[1] if best else None


def require_coarse_grid(method: str, budget: Budget, spec: ModelSpec) -> None:
    """Refuse a budget that is no raster of the backbone's picture; says which are.

    Raises
    ------
    BudgetError
        For a backbone with a fixed raster; with dynamic resolution each picture decides.
    """
    if spec.grid is None or coarse_grid(budget.tokens, spec.grid):
        return
    served = [n for n in range(1, spec.grid[0] * spec.grid[1] + 1) if coarse_grid(n, spec.grid)]
    near = sorted(sorted(served, key=lambda n: abs(n - budget.tokens))[:4])
    raise BudgetError(
        f"{method} reduces the {spec.grid[0]}x{spec.grid[1]} raster of {spec.name} to a coarser "
        f"one and cannot make {budget.tokens} tokens; near: {', '.join(map(str, near))}"
    )
