"""Windows, clusters, votes and merging on cases small enough to work out by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from test_invariants import close
from test_selective import LLAVA, build
from torch import Tensor

from etcbench.merging import dpc_knn, merge, shared_attention
from etcbench.selection import Kind, Layout
from etcbench.states import LayerState
from etcbench.windows import Windows, bipartite, chain, sequence_windows, windows_of


def test_stage_windows() -> None:
    """Spec 6.2: 6x6 windows leave the odd columns; then 81/72/72/63 tokens a window."""
    assert chain(Windows(), 576, 3) == (576, 288, 145, 73)
    assert chain(Windows(grid=(24, 24)), 576, 3) == (576, 288, 144, 72)
    gone, target = Windows().match(0, 4, torch.randn(1, 576, 4), torch.arange(576)[None])
    left = (~gone[0]).nonzero()[:, 0]
    assert torch.equal(left, torch.arange(576)[torch.arange(576) % 24 % 2 == 1])
    window = windows_of(24, 24, 4)
    assert torch.equal(window[target[0]], window)
    assert windows_of(24, 24, 2)[left].bincount().tolist() == [72] * 4
    assert sequence_windows(288, 2).bincount().tolist() == [81, 72, 72, 63]
    assert Windows(sides=(4,)).side(0, 127) == 0
    assert Windows().side(0, 127) == 2


def test_the_most_similar_pairs_merge() -> None:
    base = F.normalize(
        torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [1, -0.5], [0.2, 1], [0, -1]]), dim=1
    )
    gone, target = bipartite(base[None], torch.zeros(1, 6, dtype=torch.long), 0.34)
    # sources 0, 2, 4; destinations 1, 3, 5; 4 is nearest to 1, then 0 to 3
    assert gone[0].nonzero()[:, 0].tolist() == [0, 4]
    assert (target[0, 4], target[0, 0]) == (1, 3)


def test_clusters_are_the_groups() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    groups = torch.tensor([0, 0, 1, 2, 1, 0, 2, 2, 1])
    tokens = centres[groups] + 0.1 * torch.randn(9, 2)
    chosen, label = dpc_knn(tokens[None], 3)
    assert sorted(groups[chosen[0]].tolist()) == [0, 1, 2]
    assert torch.equal(groups[chosen[0]][label[0]], groups)


def test_merging_is_a_weighted_mean() -> None:
    values = torch.tensor([[[1.0], [2], [4], [8]]])
    row, source, target = (torch.tensor([x]) for x in (0, 3, 1))
    terms = (row, source, target, torch.tensor([0.25]))
    own = torch.tensor([[1.0, 0.75, 1, 1]])
    keep = torch.tensor([[True, True, True, False]])
    later = torch.tensor([[0, 1, 0, 0]], dtype=torch.uint8)
    assert merge(keep, [terms], own).apply(values).flatten().tolist() == [1, 3.5, 4]
    assert merge(keep, [terms], own, later).apply(values).flatten().tolist() == [1, 4, 3.5]


@dataclass
class Table:
    """Attention with given logits, shape (batch, heads, tokens, tokens)."""

    values: Tensor

    def logits(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        batch = torch.arange(len(rows))[:, None]
        chosen = self.values.transpose(1, 2)[batch, rows].transpose(1, 2)
        if columns is None:
            return chosen
        return chosen.permute(0, 3, 1, 2)[batch, columns].permute(0, 2, 3, 1)

    def weights(self, rows: Tensor) -> Tensor:
        return self.logits(rows).softmax(-1)

    def rotary_response(self, rows: Tensor) -> Tensor:
        return torch.ones(*rows.shape, self.values.shape[-1])


def state_of(kinds: list[Kind], values: Tensor, marks: Tensor | None = None) -> LayerState:
    layout = Layout.build(torch.tensor([[int(kind) for kind in kinds]]))
    return LayerState(
        0, torch.zeros(1, len(kinds), 2), layout, layout, marks, Table(values), Table(values)
    )


@pytest.mark.parametrize("axis", ["query", "key"])
def test_guidance_is_the_attention_between_picture_and_text(axis: str) -> None:
    """Spec 6.3."""
    kinds = [Kind.PREFIX, Kind.VISUAL, Kind.VISUAL, Kind.SUFFIX, Kind.PAD]
    values = torch.randn(1, 3, 5, 5)
    state = state_of(kinds, values)
    visual = state.layout.is_kind(Kind.VISUAL)
    found = shared_attention(state, visual, axis)  # type: ignore[arg-type]
    shares = values[:, :, :4, :4].softmax(2 if axis == "query" else 3)
    assert close(found[0, 1:3], shares[0, :, 1:3][:, :, [0, 3]].sum((0, 2)), 1e-6)


def test_raters_are_the_text_that_resembles_the_picture() -> None:
    """Spec 3.2; text that is all alike votes as a whole."""
    method = build("sparsevlm", "192", LLAVA)
    kinds = [Kind.SUFFIX if i > 2 else Kind.VISUAL for i in range(6)]
    layout = Layout.build(torch.tensor([[int(kind) for kind in kinds]]))
    embeds = torch.tensor([[[4.0, 0], [4, 1], [3, 0], [2, 0], [0, 1], [-1, 0]]])
    assert method.mark(embeds, layout)[0].tolist() == [False] * 3 + [True, False, False]
    embeds[0, 3:] = torch.tensor([1.0, 1])
    assert method.mark(embeds, layout)[0].tolist() == [False] * 3 + [True] * 3


def test_sparsevlm_2_lets_the_heads_vote_that_look_at_the_picture() -> None:
    """Spec 3.7."""
    spec = replace(LLAVA, layers=2, heads=2, visual_tokens=3)
    method = build("sparsevlm", "kept:1", spec, version="2.0", heads=1)
    kinds = [Kind.VISUAL] * 3 + [Kind.SUFFIX] * 2
    values = torch.zeros(1, 2, 5, 5)
    values[0, 0, 4] = torch.tensor([3.0, 0, 0, 9, 9])  # this head looks at the text
    values[0, 1, 4] = torch.tensor([0.0, 0, 5, 0, 0])
    marks = torch.tensor([[False] * 4 + [True]])
    selection = method.select_hidden(state_of(kinds, values, marks))
    assert selection.index.tolist() == [[2, 3, 4]]


def test_sparsevlm_1_0_counts_by_rank() -> None:
    """Spec 3.4: two raters that say the same have rank one."""
    spec = replace(LLAVA, layers=8, visual_tokens=36)
    method = build("sparsevlm", "12", spec, version="1.0")
    kinds = [Kind.VISUAL] * 36 + [Kind.SUFFIX] * 3
    marks = torch.tensor([[False] * 36 + [True] * 3])
    values = torch.randn(1, 2, 39, 39)
    selection = method.select_hidden(state_of(kinds, values, marks))
    kept = int(13.5 * 3 * 36 / 576)
    assert int((selection.index < 36).sum()) == kept + (int(0.3 * (36 - kept)) + 1) // 10 + 1
    values[:, :, 37:] = values[:, :, 36:37]
    one = method.select_hidden(state_of(kinds, values, marks))
    assert int((one.index < 36).sum()) == 1 + (int(0.3 * 35) + 1) // 10 + 1
