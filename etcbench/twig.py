"""The gated pruning head of TwigVLM++ (spec selective 7.6)."""

from __future__ import annotations

from torch import Tensor, nn

from etcbench.budget import ModelSpec
from etcbench.selection import Kind, Layout, Selection
from etcbench.states import Attention


class Gate(nn.Linear):
    """ReLU(Wx) * sigmoid(Wx), without bias (7.6)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Gate values of the same shape but for the last dimension."""
        projected = super().forward(x)
        return projected.relu() * projected.sigmoid()


class PruningHead(nn.Module):
    """P-Head: gates on the queries and keys of the last twig layer.

    With fewer key than query heads the key gate has the keys' width (7.6).
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.query = Gate(spec.hidden, spec.heads * spec.head_dim)
        self.key = Gate(spec.hidden, spec.kv_heads * spec.head_dim)

    def forward(self, attention: Attention, rows: Tensor, layout: Layout) -> Tensor:
        """Distribution of each row over the visual tokens, mean of the heads.

        Returns
        -------
        Tensor
            fp32, shape (batch, rows, visual), in the order of `visual_places`.
        """
        return visual_attention(attention, rows, layout, (self.query, self.key)).mean(1)


def visual_places(layout: Layout) -> Tensor:
    """Positions of each row's visual tokens, shape (batch, visual); -1 for padding."""
    return Selection.from_mask(layout.is_kind(Kind.VISUAL)).index


def visual_attention(
    attention: Attention,
    rows: Tensor,
    layout: Layout,
    gates: tuple[nn.Module, nn.Module] | None = None,
) -> Tensor:
    """Softmax over the visual tokens only, per head: fp32, (batch, heads, rows, visual)."""
    places = visual_places(layout)
    logits = attention.logits(rows, places.clamp_min(0), gates).float()
    return logits.masked_fill((places < 0)[:, None, None], float("-inf")).softmax(-1).nan_to_num()
