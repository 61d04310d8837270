"""Average pooling of the visual tokens: the simplest merge at equal budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etcbench.compressor import Compressor, ModelSpec
from etcbench.grids import cells, grid_within, require_coarse_grid
from etcbench.selection import Selection


@dataclass(eq=False)
class Pool(Compressor):
    """Average the visual embeddings over the cells of a coarser raster.

    The cells are those of adaptive average pooling (`etcbench.grids.cells`).
    """

    def prepare(self, spec: ModelSpec) -> None:
        """Check that the budget is a raster."""
        assert self.budget is not None
        require_coarse_grid(self.name(), self.budget, spec)

    def select_embeds(self, embeds: Tensor, grid: Tensor, keys: list[str]) -> Selection:
        """Merge each cell into its middle token."""
        assert self.budget is not None
        budgets = [self.budget.at(count).tokens for count in grid.prod(-1).tolist()]
        index = torch.full((len(embeds), max(budgets, default=0)), -1)
        own = torch.zeros(index.shape)
        terms: list[tuple[int, int, int, float]] = []
        for picture, (rows, columns) in enumerate(grid.tolist()):
            shape = grid_within(budgets[picture], (rows, columns))
            for slot, (down, across) in enumerate(cells((rows, columns), shape)):
                cell = [y * columns + x for y in down for x in across]
                middle = down[(len(down) - 1) // 2] * columns + across[(len(across) - 1) // 2]
                index[picture, slot], own[picture, slot] = middle, 1 / len(cell)
                terms += [
                    (picture, slot, token, 1 / len(cell)) for token in cell if token != middle
                ]
        device = embeds.device
        row, slots, source, weight = (
            (list(part) for part in zip(*terms, strict=True)) if terms else ([],) * 4
        )
        extra = (
            torch.tensor(row, dtype=torch.long, device=device),
            torch.tensor(slots, dtype=torch.long, device=device),
            torch.tensor(source, dtype=torch.long, device=device),
            torch.tensor(weight, dtype=torch.float, device=device),
        )
        return Selection(index.to(device), own.to(device), extra)


METHOD = Pool
