"""VisionZip: keep the patches that CLS attends to, merge the rest into a few contextual tokens.

From spec selective 4, training-free variant: selection at the tower's feature layer, before the
projector. Decisions of its register: 162+30 / 108+20 / 54+10 for 192 / 128 / 64 (11.7), hence
dominant : contextual = 27 : 5 at other budgets. Question-independent, so the compressed prefix
serves every question.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from etcbench.compressor import Compressor, ModelSpec, VisionStates, top_mask
from etcbench.errors import BudgetError, UsageError
from etcbench.selection import Selection


@dataclass(eq=False)
class VisionZip(Compressor):
    """Dominant tokens (CLS first, then raster order) followed by contextual tokens.

    Parameters
    ----------
    contextual : int, optional
        Merged tokens; default 5/32 of the budget, at least one if the budget is above one.
    """

    contextual: int | None = None

    def prepare(self, spec: ModelSpec) -> None:
        """Split the budget into dominant (CLS included) and contextual tokens."""
        assert self.budget is not None
        if not spec.has_cls:
            raise UsageError(f"visionzip ranks by the CLS token, and {spec.name} has none")
        total = self.budget.tokens
        if self.contextual is None:
            self.contextual = min(max(round(total * 5 / 32), 1), total - 1)
        if not 0 <= self.contextual < total:
            raise BudgetError(
                f"visionzip: {self.contextual} contextual tokens leave no dominant one of {total}"
            )

    @property
    def dominant(self) -> int:
        """Tokens kept as they are, CLS included."""
        assert self.budget is not None and self.contextual is not None
        return self.budget.tokens - self.contextual

    def schedule(self, visual_tokens: int, layers: int) -> list[int]:
        """Every layer holds dominant + contextual tokens."""
        assert self.budget is not None
        return [self.budget.tokens] * layers

    def select_vision(self, vision: VisionStates) -> Selection:
        """Choose and merge at the feature layer (spec selective 4.2)."""
        assert self.contextual is not None
        device = vision.features.device
        batch, tokens = vision.features.shape[:2]
        received = vision.attention_rows(torch.zeros(1, dtype=torch.long, device=device))
        scores = received.sum(1)[:, 0]
        patches = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        patches[:, 0] = False
        keep = top_mask(scores, patches, self.dominant - 1)
        keep[:, 0] = True
        dominant = keep.nonzero()[:, 1].view(batch, -1)
        if self.contextual == 0:
            return Selection(dominant)
        rest = (~keep).nonzero()[:, 1].view(batch, -1)
        step = max(1, rest.shape[1] // self.contextual)
        places = torch.arange(rest.shape[1], device=device)
        is_target = (places % step == 0) & (places // step < self.contextual)
        targets, sources = rest[:, is_target], rest[:, ~is_target]
        return _merge(dominant, targets, sources, vision.attention_keys())


def _merge(dominant: Tensor, targets: Tensor, sources: Tensor, keys: Tensor) -> Selection:
    """Add to each target the mean of the sources whose keys are most similar to its own.

    The sum, not the average, is what the method does (spec selective 4.2 item 6).
    """
    metric = F.normalize(keys.float(), dim=-1)
    batch = torch.arange(len(keys), device=keys.device)[:, None]
    similarity = metric[batch, sources] @ metric[batch, targets].transpose(-1, -2)
    own = torch.ones(len(keys), dominant.shape[1] + targets.shape[1], device=keys.device)
    index = torch.cat([dominant, targets], 1)
    if sources.shape[1] == 0:
        return Selection(index)
    cluster = similarity.argmax(-1)
    size = torch.zeros_like(targets).scatter_add(1, cluster, torch.ones_like(cluster))
    weight = 1 / size.gather(1, cluster).float()
    slot = cluster + dominant.shape[1]
    row = batch.expand_as(cluster)
    return Selection(
        index, own, (row.flatten(), slot.flatten(), sources.flatten(), weight.flatten())
    )


METHOD = VisionZip
