"""Variational information distillation: how well Z explains the target (eqs. 15-18)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etcbench.compressor import ModelSpec
from etcbench.etc.decoders import DECODERS
from etcbench.etc.method import ETC
from etcbench.etc.target import attention_weighted_target, text_attention, voting_tokens
from etcbench.selection import Kind, Selection
from etcbench.states import PassStates

EPS = 1e-5


class VIDLoss(nn.Module):
    """Decoder from Z to the target, and a Gaussian likelihood with learned variances.

    Variances are softplus(rho) + eps (eq. 17). On the first batch they start at the target's own
    and the decoder's bias at the target's mean, channel by channel, so that the loss starts where
    a decoder that ignores Z would bring it.

    Parameters
    ----------
    method : ETC
        The options.
    spec : ModelSpec
        The backbone.

    Attributes
    ----------
    layer : int
        Decoder layers that run before the states at the alignment layer.
    second_pass : {None, "own", "initial"}
        Whether the target comes from another pass over the batch, and by which weights.
    """

    started: Tensor

    def __init__(self, method: ETC, spec: ModelSpec) -> None:
        super().__init__()
        self.method = method
        index = max(method.layer % (spec.layers + 1), 1)
        self.final = index == spec.layers
        self.layer = min(index, spec.layers - 1)
        self.second_pass = {"full_pass": "own", "frozen_teacher": "initial"}.get(method.attn_source)
        self.decoder = DECODERS[method.decoder](method, spec)
        if method.auxiliary == "vid":
            places = self.decoder.places
            shapes = {"scalar": (1,), "channel": (spec.hidden,), "entry": (places, spec.hidden)}
            self.rho = nn.Parameter(torch.zeros(shapes[method.variance]))
        self.register_buffer("started", torch.tensor(False))

    def forward(self, batch: Any, own: PassStates) -> dict[str, Tensor]:
        """Compute the weighted loss of a batch (see `Compressor.training_module`).

        Parameters
        ----------
        batch : etcbench.packing.PackedBatch
            The samples.
        own : PassStates
            The training pass, rows with a picture only.

        Returns
        -------
        dict of str to Tensor
            ``loss``, weighted; for the log ``unexplained`` and quantiles of the variances.
        """
        source = own if self.second_pass is None else own.again(self.second_pass == "initial")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.method.detach):
            target, present = self.target(batch, source)
        last = self.final or self.method.z_layer == "last"
        learned, _ = self.states(Kind.LEARNED, own, last)
        loss, unexplained = self.likelihood(learned, target, present, own.grid)
        # A sample without a picture adds nothing, but counts in the batch's mean.
        loss = loss * len(learned) / len(batch.prompts)
        return {
            "loss": self.method.lambda_vid * loss,
            "unexplained": unexplained,
            **self.variances(),
        }

    def states(self, kind: Kind, states: PassStates, last: bool) -> tuple[Tensor, Tensor]:
        """Take the hidden states of one kind of token, at the alignment layer or the last one.

        Returns
        -------
        tuple of Tensor
            Shape (batch, most tokens, D), padded, and which of them exist, (batch, most tokens).
        """
        chosen = Selection.from_mask(states.layout.is_kind(kind))
        taken = chosen.gather(states.outputs if last else states.hidden)
        if last and self.method.final_norm:
            taken = states.norm(taken)
        return taken, chosen.index >= 0

    def target(self, batch: Any, source: PassStates) -> tuple[Tensor, Tensor]:
        """Weight the visual states by the text's attention (eqs. 9-11).

        Returns
        -------
        tuple of Tensor
            The target, fp32, shape (batch, N, D), and which of its tokens exist, (batch, N).
        """
        votes = voting_tokens(batch, self.method.text_rows)[: source.layout.batch]
        votes = F.pad(votes, (source.layout.tokens - votes.shape[1], 0)).to(source.hidden.device)
        if self.method.alpha:
            attention = text_attention(source.attention, votes)
        else:
            attention = torch.zeros(votes.shape, device=votes.device)
        visual, present = self.states(Kind.VISUAL, source, self.final)
        received = Selection.from_mask(source.layout.is_kind(Kind.VISUAL)).gather(attention)
        weighted = attention_weighted_target(visual, received, self.method.alpha, present)
        return weighted, present

    def likelihood(
        self, learned: Tensor, target: Tensor, present: Tensor, grid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of the target, mean over its pictures (eq. 16).

        Parameters
        ----------
        learned : Tensor, shape (batch, M, D)
            Hidden states of the learned tokens at the alignment layer.
        target : Tensor, shape (batch, N, D)
            See `attention_weighted_target`.
        present : Tensor, bool, shape (batch, N)
            False where a picture has fewer tokens.
        grid : Tensor, long, shape (batch, 2)
            Raster of each picture.

        Returns
        -------
        tuple of Tensor
            The loss, and the decoder's squared error over the target's variance (1 = no better
            than each channel's mean).
        """
        with torch.no_grad():
            count = present.sum()
            center = (target * present[..., None]).sum((0, 1)) / count
            spread = ((target - center) ** 2 * present[..., None]).sum((0, 1)) / count
            if self.training and not self.started:
                self._start(center, spread)
        with torch.autocast(learned.device.type, enabled=False):
            mean = self.decoder(learned, grid).float()
            squared = (target - mean).masked_fill(~present[..., None], 0) ** 2
            loss = self._reduce(squared, present)
        unexplained = squared.detach().sum() / (count * spread.sum())
        return loss, unexplained

    def variance(self) -> Tensor:
        """Learned variances (eq. 17), all 1 for the MSE."""
        if self.method.auxiliary == "mse":
            return torch.ones(1, device=self.started.device)
        return F.softplus(self.rho.float()) + EPS

    def variances(self) -> dict[str, Tensor]:
        """Quantiles of the learned variances, for the log."""
        if self.method.auxiliary == "mse":
            return {}
        low, middle, high = (
            self.variance()
            .detach()
            .flatten()
            .quantile(torch.tensor([0.05, 0.5, 0.95], device=self.rho.device))
        )
        return {"variance_low": low, "variance_median": middle, "variance_high": high}

    def _reduce(self, squared: Tensor, present: Tensor) -> Tensor:
        """Sum errors per variance first: the log and the division then run over few numbers."""
        variance, tokens = self.variance(), present.sum(1)
        if self.method.variance == "entry":
            per_sample = (squared / (2 * variance)).sum((1, 2)) + variance.log().sum() / 2
        else:
            error = squared.sum(1) / (2 * variance)
            logs = variance.log().expand(squared.shape[-1]).sum() / 2
            per_sample = error.sum(1) + tokens * logs
        if self.method.vid_reduction != "sum":
            per_sample = per_sample / tokens
        if self.method.vid_reduction == "mean_all":
            per_sample = per_sample / squared.shape[-1]
        return per_sample.mean()

    def _start(self, center: Tensor, spread: Tensor) -> None:
        self.decoder.bias.copy_(center)
        if self.method.auxiliary == "vid":
            spread = spread.mean().expand(1) if self.method.variance == "scalar" else spread
            spread = spread.clamp_min(1e-4) - EPS
            self.rho.copy_(spread + torch.log(-torch.expm1(-spread)))  # softplus, inverted
        self.started.fill_(True)
