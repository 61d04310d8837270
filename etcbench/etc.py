"""ETC, Extreme Token Compression: one to four tokens for a picture (arXiv 2606.00543).

At inference ETC is a bottleneck of M learned tokens. In training one loss is added: from the
learned tokens' hidden states a small decoder must reconstruct, under a Gaussian with learned
variance (variational information distillation), the visual hidden states of the same layer,
weighted by how strongly the text attends to each of them. Spec abstractive 1; the choices that
the paper leaves open are the decision register's E1-E13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etcbench.bottleneck import Bottleneck
from etcbench.compressor import ModelSpec
from etcbench.errors import UsageError
from etcbench.selection import Kind, Layout


@dataclass(eq=False)
class ETC(Bottleneck):
    """M distinct learned tokens, trained with L_CE + lambda * L_VID (eq. 18).

    Parameters
    ----------
    alpha : float
        Weight of the attention in the target, 0 (uniform) to 1 (eq. 11).
    lambda_vid : float
        Weight of the auxiliary loss; 0 trains exactly as VoCo-LLaMA does.
    layer : int
        Alignment layer in the hidden-states convention: -1 is the last, after the final norm.
    rank : int
        Width of the decoder's bottleneck.
    """

    alpha: float = 0.6
    lambda_vid: float = 1e-5
    layer: int = -1
    rank: int = 8

    def prepare(self, spec: ModelSpec) -> None:
        """Create the learned embeddings; check the options."""
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"etc: alpha is a mixing weight between 0 and 1, not {self.alpha}")
        if self.lambda_vid < 0:
            raise UsageError(f"etc: lambda_vid cannot be negative ({self.lambda_vid})")
        if not -spec.layers <= self.layer <= spec.layers:
            raise UsageError(f"etc: {spec.name} has layers 0 to {spec.layers}, not {self.layer}")
        super().prepare(spec)

    def training_module(self, spec: ModelSpec) -> VIDLoss | None:
        """Build the decoder and variances, which exist only while training."""
        if self.lambda_vid == 0:
            return None
        return VIDLoss(self, spec)


def attention_weighted_target(visual: Tensor, attention: Tensor, alpha: float) -> Tensor:
    """Weight visual hidden states by the attention they receive (eqs. 9-11).

    Parameters
    ----------
    visual : Tensor, shape (batch, N, D)
        Hidden states of the visual tokens at the alignment layer.
    attention : Tensor, shape (batch, N)
        Attention from the text, averaged over heads and text rows.
    alpha : float
        0 returns ``visual``; 1 silences the least attended token.

    Returns
    -------
    Tensor
        Detached target, fp32, shape (batch, N, D).
    """
    scores = attention.detach().float()
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    scaled = (scores - low) / (high - low + 1e-6 * (high == low))
    return ((1 - alpha) + alpha * scaled)[..., None] * visual.detach().float()


class VIDLoss(nn.Module):
    """Decoder from Z to the target, and the Gaussian likelihood with one variance per channel.

    The decoder is a two-layer MLP of width ``rank`` from all of Z to all of V (register E6);
    variances are softplus(rho) + eps (eq. 17), started at the target's own on the first batch.

    Parameters
    ----------
    method : ETC
        The options.
    spec : ModelSpec
        The backbone; must have a fixed number of visual tokens.
    """

    eps = 1e-5
    started: Tensor

    def __init__(self, method: ETC, spec: ModelSpec) -> None:
        super().__init__()
        assert method.budget is not None
        if spec.visual_tokens is None:
            raise UsageError(f"etc: {spec.name} has no fixed number of visual tokens")
        self.alpha, self.weight = method.alpha, method.lambda_vid
        self.final = method.layer in (-1, spec.layers)
        # Register E13: layer 0 means the output of the first block, where Z has seen the picture.
        self.layer = spec.layers - 1 if self.final else max(method.layer % spec.layers, 1)
        self.shape = (spec.visual_tokens, spec.hidden)
        self.decoder = nn.Sequential(
            nn.Linear(method.budget.tokens * spec.hidden, method.rank),
            nn.GELU(),
            nn.Linear(method.rank, spec.visual_tokens * spec.hidden),
        )
        self.rho = nn.Parameter(torch.zeros(spec.hidden))
        self.register_buffer("started", torch.tensor(False))

    def forward(
        self, backbone: Any, inputs: Any, outputs: Any, instruction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weighted loss of a batch of sequences (see `Compressor.training_module`)."""
        layout = inputs.layout
        states = backbone.norm(outputs.hidden) if self.final else inputs.hidden
        visual = layout.is_kind(Kind.VISUAL)
        learned = layout.is_kind(Kind.LEARNED)
        with torch.no_grad():
            attention = text_to_image_attention(
                backbone, self.layer, inputs.hidden, layout, instruction
            )

        def only(mask: Tensor, values: Tensor) -> Tensor:
            return values[mask].unflatten(0, (len(values), -1))

        loss, unexplained = self.likelihood(
            only(learned, states), only(visual, states), only(visual, attention)
        )
        return self.weight * loss, unexplained

    def likelihood(
        self, learned: Tensor, visual: Tensor, attention: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood, summed over tokens and channels, mean over the batch (eq. 16).

        Parameters
        ----------
        learned : Tensor, shape (batch, M, D)
            Hidden states of the learned tokens at the alignment layer.
        visual, attention : Tensor
            See `attention_weighted_target`.

        Returns
        -------
        tuple of Tensor
            The loss, and the decoder's squared error over the target's variance (1 = no better
            than each channel's mean).
        """
        target = attention_weighted_target(visual, attention, self.alpha)
        spread = target.var((0, 1), unbiased=False)
        if self.training and not self.started:
            with torch.no_grad():
                self.rho.copy_(torch.expm1(spread.clamp_min(1e-4)).log())
                self.started.fill_(True)
        with torch.autocast(learned.device.type, enabled=False):
            mean = self.decoder(learned.float().flatten(1)).unflatten(1, self.shape)
            variance = F.softplus(self.rho.float()) + self.eps
            squared = (target - mean) ** 2
            per_entry = squared / (2 * variance) + variance.log() / 2
        unexplained = squared.detach().mean((0, 1)).sum() / spread.sum()
        return per_entry.sum((1, 2)).mean(), unexplained


def text_to_image_attention(
    backbone: Any, layer: int, hidden: Tensor, layout: Layout, instruction: Tensor
) -> Tensor:
    """Attention from instruction tokens as it would be without the bottleneck (register E1, E2).

    Under the bottleneck mask text never sees the picture, so its weights there are zero. The
    queries and keys of one layer are taken from the same pass instead, and the softmax runs over
    every key that plain causal attention allows.

    Parameters
    ----------
    layer : int
        Decoder layer whose projections are used; ``hidden`` is its input, (batch, tokens, D).
    layout : Layout
        What each position is.
    instruction : Tensor, bool, shape (batch, text)
        Which of the last ``text`` positions vote.

    Returns
    -------
    Tensor
        Shape (batch, tokens): mean over heads and instruction tokens (eq. 9).
    """
    rotary = backbone.rotary(hidden, layout.positions)
    query, key = backbone.queries_keys(layer, hidden, rotary)
    count = instruction.shape[1]
    query = query[:, :, -count:]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    order = torch.arange(layout.tokens, device=hidden.device)
    turn = layout.turn
    seen = (order <= order[-count:, None]) & layout.valid[:, None]
    seen = seen & ((turn[:, None] < 0) | (turn[:, None] == turn[:, -count:, None]))
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num()
    votes = instruction.float()
    return torch.einsum("bhqk,bq->bk", weights, votes / votes.sum(-1, keepdim=True).clamp_min(1))


METHOD = ETC
