"""VisionZip: keep the tokens that the tower attends to most, merge the rest into a few contextual.

From spec selective 4, training-free or with a tuned projector (the paper's double dagger).
Decisions of its register: 162+30 / 108+20 / 54+10 for 192 / 128 / 64 (11.7), hence dominant :
contextual = 27 : 5 at other budgets and backbones; the tuned variant trains the projector alone
(11.8). Question-independent, so the compressed prefix serves every question.

With a CLS token (4.2) the selection is at the tower's feature layer: patches are ranked by the
CLS row of its attention, CLS itself is the first dominant token, contextual tokens stand last.
Without one (4.8) merged tokens are ranked by the attention they receive from their whole picture,
and contextual tokens stand at the raster place of the token that they grew from.

Where pictures are cut into tiles (4.4), the budget is that of a picture of the most tiles, and each
tile gets the same part: 640, 320 and 160 of LLaVA-NeXT are 128, 64 and 32 of each of five. A share
is one of each tile's patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from etcbench.budget import NOMINAL
from etcbench.compressor import Compressor, ModelSpec, VisionStates, top_mask
from etcbench.costs import Case
from etcbench.errors import BudgetError
from etcbench.selection import Selection

CHUNK = 64  # rows of the tower's attention at a time; bounds memory on large pictures


@dataclass(eq=False)
class VisionZip(Compressor):
    """Dominant tokens and contextual tokens; a picture within the budget keeps everything.

    Parameters
    ----------
    contextual : int, optional
        Merged tokens, of each tile; default 5/32 of the budget, at least one if the budget is
        above one.
    projector : {"original", "tuned"}
        The model's own projector, or one trained on the selected tokens (4.7), which comes from a
        checkpoint for this budget.
    """

    contextual: int | None = None
    projector: Literal["original", "tuned"] = "original"

    @classmethod
    def needs_weights(cls, options: dict[str, Any]) -> bool:
        """Only the tuned projector has weights."""
        return options.get("projector") == "tuned"

    def prepare(self, spec: ModelSpec) -> None:
        """Split the budget into dominant (CLS included) and contextual tokens."""
        assert self.budget is not None
        self.tiles = spec.tiles
        total = self.total(NOMINAL)
        if not total:
            raise BudgetError(
                f"visionzip: {self.budget} tokens are less than one for each of the {spec.tiles} "
                f"tiles of {spec.name}"
            )
        if self.contextual is None and self.budget.share is None:
            self.contextual = self.split(NOMINAL)[1]
        if self.contextual is not None and not 0 <= self.contextual < total:
            raise BudgetError(
                f"visionzip: {self.contextual} contextual tokens leave no dominant one of {total}"
            )

    def total(self, patches: int) -> int:
        """Tokens of a tile that has so many patches; of the picture where it is not cut."""
        assert self.budget is not None
        if self.budget.share is None:
            return self.budget.tokens // self.tiles
        return self.budget.of(patches)

    def split(self, patches: int) -> tuple[int, int]:
        """Tokens kept as they are, CLS included, and contextual ones, of a tile or picture."""
        total, contextual = self.total(patches), self.contextual
        if contextual is None:
            contextual = max(round(total * 5 / 32), 1)
        contextual = min(contextual, total - 1)
        return total - contextual, contextual

    def projected(self, tokens: int) -> int:
        """Only what is kept."""
        return self.schedule(tokens, 1)[0]

    def own_macs(self, case: Case) -> int:
        """Count the attention of CLS, or of all tokens; keys; their likeness to the targets."""
        tokens = case.tower.tokens
        scores = case.tower.scores(1 if case.spec.has_cls else tokens)
        contextual = self.split(case.visual)[1]
        if not contextual or tokens <= self.projected(case.visual):
            return scores
        return scores + case.tower.keys + tokens * contextual * case.tower.key_size

    def select_vision(self, vision: VisionStates) -> Selection:
        """Choose and merge (spec selective 4.2, 4.8)."""
        places = torch.arange(vision.features.shape[1], device=vision.features.device)
        counts = vision.grid.prod(-1, keepdim=True) + int(vision.has_cls)
        present = places < counts
        is_cls = (places == 0) & vision.has_cls
        splits = [self.split(patches) for patches in vision.grid.prod(-1).tolist()]
        dominant, contextual = (
            torch.tensor(splits, device=counts.device).reshape(-1, 2).T[..., None]
        )
        wanted = torch.where(counts <= dominant + contextual, counts, dominant)
        best = top_mask(_scores(vision), present & ~is_cls, wanted[:, 0] - int(vision.has_cls))
        keep = best | is_cls
        rest = present & ~keep
        order = rest.cumsum(1) - 1
        step = (rest.sum(1, keepdim=True) // contextual.clamp_min(1)).clamp_min(1)
        target = rest & (order % step == 0) & (order // step < contextual)
        slots = (keep | target).cumsum(1) - 1
        if vision.has_cls:
            behind = keep.sum(1, keepdim=True) + target.cumsum(1) - 1
            slots = torch.where(target, behind, keep.cumsum(1) - 1)
        return _merge(keep | target, target, rest & ~target, slots, vision)


def _scores(vision: VisionStates) -> Tensor:
    """Attention from CLS summed over heads, or received from all tokens, (pictures, tokens)."""
    device = vision.features.device
    if vision.has_cls:
        return vision.attention_rows(torch.zeros(1, dtype=torch.long, device=device)).sum(1)[:, 0]
    rows = torch.arange(vision.features.shape[1], device=device).split(CHUNK)
    return torch.stack([vision.attention_rows(part).mean(1).sum(1) for part in rows]).sum(0)


def _merge(
    out: Tensor, target: Tensor, source: Tensor, slots: Tensor, vision: VisionStates
) -> Selection:
    """Add to each target the mean of the sources whose keys are most similar to its own.

    The sum, not the average, is what the method does (spec selective 4.2 item 6).

    Parameters
    ----------
    out, target, source : Tensor, bool, shape (pictures, tokens)
        Tokens that have an output slot; those that take sources in; those that are merged away.
    slots : Tensor, long, shape (pictures, tokens)
        Output slot of each token that has one.
    """
    index = torch.full((len(out), int(out.sum(1).max())), -1, device=out.device)
    row, token = out.nonzero(as_tuple=True)
    index[row, slots[row, token]] = token
    targets = Selection.from_mask(target).index
    if targets.shape[1] == 0:
        return Selection(index)
    metric = F.normalize(vision.attention_keys().float(), dim=-1)
    chosen = Selection(targets).gather(metric)
    similarity = (metric @ chosen.transpose(1, 2)).masked_fill(targets[:, None] < 0, -torch.inf)
    row, token = source.nonzero(as_tuple=True)
    slot = slots[row, targets[row, similarity.argmax(-1)[row, token]]]
    size = torch.zeros_like(index).index_put((row, slot), torch.ones_like(slot), accumulate=True)
    return Selection(index, None, (row, slot, token, 1 / size[row, slot].float()))


METHOD = VisionZip
