"""Merging of visual tokens: who goes into whom, and the `Selection` that says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from etcbench.compressor import top_mask
from etcbench.costs import Case
from etcbench.selection import Kind, Selection
from etcbench.states import LayerState

Terms = tuple[Tensor, Tensor, Tensor, Tensor]
Axis = Literal["query", "key"]
Guidance = Literal["prompt", "random", "uniform"]


def equal_rows(mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch the rows that have equally many marked tokens; rows without any are left out.

    Parameters
    ----------
    mask : Tensor, bool, shape (batch, tokens)
        The marked tokens.

    Yields
    ------
    tuple of Tensor
        Row numbers, shape (rows,), and their marked positions in order, shape (rows, marked).
    """
    counts = mask.sum(-1)
    for count in counts.unique().tolist():
        if count:
            rows = (counts == count).nonzero()[:, 0]
            yield rows, mask[rows].nonzero()[:, 1].view(len(rows), count)


def merge(
    keep: Tensor, terms: Sequence[Terms], own: Tensor, later: Tensor | None = None
) -> Selection:
    """Build the selection of what is kept and of what is added to it.

    Parameters
    ----------
    keep : Tensor, bool, shape (batch, tokens)
        Positions that survive, targets of a merge included.
    terms : sequence of (row, source, target, weight)
        Each of shape (terms,): token ``source`` is added to token ``target`` of the same row.
    own : Tensor, shape (batch, tokens)
        Weight of each survivor's own state.
    later : Tensor, optional
        See `Selection.from_mask`.
    """
    selection = Selection.from_mask(keep, later)
    width = selection.index.shape[1]
    slots = torch.zeros(len(keep), keep.shape[1] + 1, dtype=torch.long, device=keep.device)
    places = selection.index.masked_fill(selection.index < 0, keep.shape[1])
    order = torch.arange(width, device=keep.device).expand_as(places)
    slots = slots.scatter(1, places, order)
    selection.own = selection.gather(own)
    if terms:
        row, source, target, weight = (torch.cat(part) for part in zip(*terms, strict=True))
        selection.extra = (row, slots[row, target], source, weight)
    return selection


def dpc_knn(
    tokens: Tensor, clusters: int, seed: int = 0, cosine: bool = False
) -> tuple[Tensor, Tensor]:
    """Cluster tokens by density peaks with nearest neighbours (spec selective 3.5 item 3).

    Parameters
    ----------
    tokens : Tensor, shape (batch, tokens, width)
        What is clustered.
    clusters : int
        Number of clusters, at most ``tokens``; also the number of neighbours, self included.
    seed : int
        Of the noise that breaks ties of the density, the same for every row.
    cosine : bool
        Assign the tokens to the centre of the highest cosine, not of the least distance.

    Returns
    -------
    tuple of Tensor
        Centres in order, shape (batch, clusters), and each token's cluster, shape (batch, tokens).
    """
    values = tokens.float()
    batch, count, width = values.shape
    exact = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(values, values, compute_mode=exact) * width**-0.5
    nearest = distance.topk(clusters, largest=False).values
    noise = torch.rand(count, generator=torch.Generator().manual_seed(seed)).to(values.device)
    density = torch.exp(-nearest.square().mean(-1)) + 1e-6 * noise
    denser = density[:, None, :] > density[:, :, None]
    gap = distance.masked_fill(~denser, float("inf")).amin(-1)
    gap = torch.where(gap.isinf(), distance.amax((1, 2))[:, None], gap)
    is_centre = top_mask(density * gap, torch.ones_like(density, dtype=torch.bool), clusters)
    centres = is_centre.nonzero()[:, 1].view(batch, clusters)
    rows = torch.arange(batch, device=values.device)[:, None]
    if cosine:
        unit = F.normalize(values, dim=-1)
        distance = -unit @ unit.transpose(1, 2)
    label = distance[rows, centres].argmin(1)
    own = torch.arange(clusters, device=values.device).expand_as(centres)
    return centres, label.scatter(1, centres, own)


def shared_attention(state: LayerState, visual: Tensor, axis: Axis) -> Tensor:
    """Attention between each visual token and all text, without causality (spec selective 6.3).

    Parameters
    ----------
    state : LayerState
        Behind the layer in question.
    visual : Tensor, bool, shape (batch, tokens)
        Visual tokens as queries; the text as keys.
    axis : {"query", "key"}
        What the softmax runs over: all tokens as queries of one key, or as keys of one query.

    Returns
    -------
    Tensor
        Sum over heads and text, fp32 and above zero, shape (batch, tokens).
    """
    valid = state.layout.valid
    rows = torch.arange(state.layout.tokens, device=visual.device).expand_as(visual)
    if axis == "query":
        text = Selection.from_mask(valid & ~visual).index
        logits = state.attention.logits(rows, text.clamp_min(0)).float()
        shares = logits.masked_fill(~valid[:, None, :, None], -torch.inf).softmax(2)
        counted = text >= 0
    else:
        logits = state.attention.logits(rows).float()
        shares = logits.masked_fill(~valid[:, None, None], -torch.inf).softmax(3)
        counted = valid & ~visual
    return (shares * counted[:, None, None]).sum((1, 3)).clamp_min(1e-20)


def mixing_weights(
    state: LayerState, visual: Tensor, guidance: Guidance, axis: Axis, heads: int, seed: int
) -> Tensor:
    """Weigh each token in a mixture (spec selective 6.3).

    The released noise runs over all text; here over that in front of the picture, so that the
    prefix serves every question.

    Parameters
    ----------
    state, visual, axis
        See `shared_attention`.
    guidance : {"prompt", "random", "uniform"}
        Attention between picture and text; noise of ``heads`` heads from ``seed``; all alike.

    Returns
    -------
    Tensor
        fp32, shape (batch, tokens).
    """
    if guidance == "prompt":
        return shared_attention(state, visual, axis)
    weight = torch.ones(visual.shape, device=visual.device)
    if guidance == "random":
        for row, prefix in enumerate(state.layout.is_kind(Kind.PREFIX).sum(-1).tolist()):
            generator = torch.Generator().manual_seed(seed * 1000 + state.layer)
            size = (heads, max(prefix, 1), int(visual[row].sum()))
            noise = torch.rand(size, generator=generator).softmax(-1).sum((0, 1))
            weight[row, visual[row]] = noise.to(weight.device)
    return weight


def mixing_macs(case: Case, layer: int, guidance: Guidance, axis: Axis) -> int:
    """Count what `mixing_weights` computes behind a layer (`Compressor.own_macs`)."""
    if guidance != "prompt":
        return 0
    length = case.length(layer)
    return case.score_rows(length, length - case.entered[layer] if axis == "query" else length)
