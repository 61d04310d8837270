"""Rasters of visual tokens: which coarser ones a budget can be served with."""

from __future__ import annotations

import math

from etcbench.compressor import Budget, ModelSpec
from etcbench.errors import BudgetError, UsageError


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
        skew = _skew((height, width), grid)
        if skew <= 1 and (best is None or skew < best[0]):
            best = (skew, (height, width))
    return best[1] if best else None


def grid_within(tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Find the largest raster of at most ``tokens`` cells, for pictures that have any shape.

    `coarse_grid` where that has an answer; ``grid`` itself if it fits; a picture so elongated that
    its cells must be more than twice as long as wide gets the most cells.
    """
    rows, columns = grid
    if rows * columns <= tokens:
        return grid

    def merit(raster: tuple[int, int]) -> tuple[bool, int, float]:
        skew = _skew(raster, grid)
        return skew <= 1, raster[0] * raster[1], -skew

    widest = [(height, min(tokens // height, columns)) for height in range(1, rows + 1)]
    return max((raster for raster in widest if raster[1]), key=merit)


def equal_sides(side: int) -> list[int]:
    """Sides of the square rasters that cut a square of ``side`` into equal cells, ascending."""
    return [count for count in range(1, side + 1) if side % count == 0]


def cells(grid: tuple[int, int], coarse: tuple[int, int]) -> list[tuple[range, range]]:
    """List the rows and columns of ``grid`` in each cell of a coarser raster, in raster order.

    Cell ``i`` of ``h`` covers rows ``floor(i * rows / h)`` to ``ceil((i + 1) * rows / h) - 1``, as
    in adaptive pooling: cells are equal where the sides divide, and else overlap.
    """
    down, across = (
        [range(i * n // count, -(-(i + 1) * n // count)) for i in range(count)]
        for n, count in zip(grid, coarse, strict=True)
    )
    return [(rows, columns) for rows in down for columns in across]


def _skew(raster: tuple[int, int], grid: tuple[int, int]) -> float:
    """How far from square a cell is: 1 means twice as long as wide."""
    return abs(math.log2((grid[0] / raster[0]) / (grid[1] / raster[1])))


def require_coarse_grid(method: str, budget: Budget, spec: ModelSpec) -> None:
    """Refuse a budget that is no raster of the backbone's picture; says which are.

    Raises
    ------
    BudgetError
        For a backbone with a fixed raster; with dynamic resolution each picture decides.
    UsageError
        If the backbone cuts pictures into tiles.
    """
    require_one_raster(method, spec)
    if spec.grid is None or coarse_grid(budget.tokens, spec.grid):
        return
    served = [n for n in range(1, spec.grid[0] * spec.grid[1] + 1) if coarse_grid(n, spec.grid)]
    near = sorted(sorted(served, key=lambda n: abs(n - budget.tokens))[:4])
    raise BudgetError(
        f"{method} reduces the {spec.grid[0]}x{spec.grid[1]} raster of {spec.name} to a coarser "
        f"one and cannot make {budget.tokens} tokens; near: {', '.join(map(str, near))}"
    )


def require_one_raster(method: str, spec: ModelSpec) -> None:
    """Refuse a backbone that cuts pictures into tiles."""
    if spec.tiles > 1:
        raise UsageError(
            f"{method} reduces one raster, and {spec.name} cuts pictures into tiles; use it with "
            "llava or qwen3_vl models"
        )
