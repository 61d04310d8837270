"""Random selection before the language model: the control that every selection must beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from etcbench.compressor import Compressor, top_mask
from etcbench.selection import Selection


@dataclass(eq=False)
class Random(Compressor):
    """Keep as many visual tokens of each picture as the budget says at random, in raster order.

    Parameters
    ----------
    seed : int
        Together with the picture's identity it fixes the choice, so the same picture keeps the
        same tokens for every question, batch and run.
    """

    seed: int = 0

    def select_embeds(self, embeds: Tensor, grid: Tensor, keys: list[str]) -> Selection:
        """Draw one score per token and keep the largest."""
        assert self.budget is not None
        scores = torch.zeros(embeds.shape[:2])
        for row, key in enumerate(keys):
            digest = hashlib.sha256(f"{self.seed} {key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            scores[row] = torch.rand(embeds.shape[1], generator=generator)
        tokens = torch.arange(embeds.shape[1], device=embeds.device)
        present = tokens < grid.prod(-1, keepdim=True)
        limit = torch.tensor([self.budget.of(count) for count in grid.prod(-1).tolist()])
        kept = top_mask(scores.to(embeds.device), present, limit.to(embeds.device))
        return Selection.from_mask(kept)


METHOD = Random
