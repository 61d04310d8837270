"""A small convolutional network that scores the tokens of a sequence of any length."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from etcbench.compressor import top_mask
from etcbench.costs import matrix_macs

WIDTHS = (32, 64, 128, 256, 512)  # channels of the layers; deeper students repeat the last
Activation = Literal["relu", "gelu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class Student(nn.Module):
    """Depthwise-separable 1-D convolutions over the visual tokens of a prompt (8.4).

    Parameters
    ----------
    channels : int
        Input channels.
    depth, kernel : int
        Layers; width of their depthwise kernels, odd.
    activation : {"relu", "gelu"}
        Behind each layer.
    """

    def __init__(self, channels: int, depth: int, kernel: int, activation: str) -> None:
        super().__init__()
        widths = [channels, *(WIDTHS[min(i, len(WIDTHS) - 1)] for i in range(depth))]
        self.depthwise = nn.ModuleList(
            nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
            for width in widths[:-1]
        )
        self.pointwise = nn.ModuleList(nn.Conv1d(a, b, 1) for a, b in pairwise(widths))
        self.activation = ACTIVATIONS[activation]()
        self.head = nn.Conv1d(widths[-1], 1, 1)

    def macs(self, tokens: int) -> int:
        """Count the multiply-accumulates on so many tokens."""
        return matrix_macs(self, tokens)

    def forward(self, seen: Tensor, present: Tensor) -> Tensor:
        """Score tokens.

        Parameters
        ----------
        seen : Tensor, shape (batch, channels, tokens)
            Attention of the instruction, zero for padding.
        present : Tensor, bool, shape (batch, tokens)
            False for padding.

        Returns
        -------
        Tensor
            Log-probabilities over the tokens, shape (batch, tokens); very low for padding.
        """
        x = seen
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            # A longer neighbour in the batch must not show at a row's end.
            x = self.activation(pointwise(depthwise(x))) * present[:, None]
        scores = self.head(x)[:, 0].masked_fill(~present, torch.finfo(x.dtype).min)
        return scores.log_softmax(-1)


def relevance_label(relevance: Tensor, present: Tensor) -> Tensor:
    """Zero the lower half of the relevance and divide the rest by its sum (8.3)."""
    upper = top_mask(relevance, present, (present.sum(-1) + 1) // 2)
    kept = relevance * upper
    flat = upper / upper.sum(-1, keepdim=True)  # an answer that relies on no token at all
    total = kept.sum(-1, keepdim=True)
    return torch.where(total > 0, kept / total.clamp_min(torch.finfo(kept.dtype).tiny), flat)
