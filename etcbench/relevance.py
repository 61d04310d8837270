"""How much an answer relies on each token of its prompt: gradient-weighted attention rollout.

From spec selective 8.2 (Chefer-style relevance). For each answer token, every layer's attention is
weighted by the gradient of that token's score with respect to it, clipped at zero and averaged
over the heads; the layers are chained with the residual path; the row of the position that emits
the token says what it relies on.

No attention map has to be kept: the model runs under any backend, and a layer's map and its
gradient are rebuilt one layer at a time from what enters and leaves the layer's attention. With
O = A V per head, the gradient with respect to A is (gradient with respect to O) V^T.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from etcbench.attention import LayerAttention
from etcbench.backbones.base import Backbone
from etcbench.backbones.stream import Stream
from etcbench.selection import Layout
from etcbench.states import RelevanceRule, Signs, Target

if TYPE_CHECKING:
    from etcbench.decoder import Decoder


def prompt_relevance(
    decoder: Decoder,
    prompt: Stream,
    start: Tensor,
    answers: Sequence[Sequence[int]],
    rule: RelevanceRule,
) -> Tensor:
    """Say how much answers rely on each position of their prompts.

    Parameters
    ----------
    decoder : Decoder
        Runs the model without compression.
    prompt : Stream
        Embedded prompts, questions included.
    start : Tensor, long, shape (batch,)
        Position of each row's first answer token.
    answers : sequence of sequence of int
        Answer tokens without the end token; an empty answer counts as its end token.
    rule : RelevanceRule
        How.

    Returns
    -------
    Tensor
        fp32, shape (batch, prompt tokens), without gradient: mean over the answer's tokens.
    """
    backbone = decoder.backbone
    end = min(backbone.eos_ids)
    replies = [list(answer) or [end] for answer in answers]
    # The engine decodes in inference mode, whose tensors no gradient can pass.
    with torch.inference_mode(False), torch.enable_grad():
        text = backbone.continue_text([reply[:-1] for reply in replies], start.clone())
        whole = Stream.cat([_fresh(prompt), text])
        passes = _forward(decoder, whole)
        emitting, tokens = _emissions(prompt.layout, replies)
        total = torch.zeros(prompt.layout.kind.shape, device=whole.hidden.device)
        for rows, wanted in zip(emitting.T, tokens.T, strict=True):
            scores = _scores(backbone, passes.hidden, rows, wanted, rule.target)
            relevance = passes.rollout(scores, rows, rule)[:, : prompt.layout.tokens]
            total += relevance * (wanted >= 0)[:, None]
    return total / (tokens >= 0).sum(1, keepdim=True)


def chained(layers: Iterable[Tensor], rows: Tensor, tokens: int) -> Tensor:
    """Take emitting rows of R, where ``R <- R + Abar R`` from the first layer up (spec 8.2).

    A row alone is had from the last layer down: ``v <- v + v Abar``.

    Parameters
    ----------
    layers : iterable of Tensor, each of shape (batch, tokens, tokens)
        Weighted attention, last layer first.
    rows : Tensor, long, shape (batch,)
        Position that emits.
    tokens : int
        Length of the sequence.

    Returns
    -------
    Tensor
        Shape (batch, tokens).
    """
    v = torch.zeros(len(rows), tokens, device=rows.device)
    v[torch.arange(len(rows), device=rows.device), rows] = 1
    for weighted in layers:
        v = v + (v[:, None] @ weighted)[:, 0]
    return v


def _fresh(prompt: Stream) -> Stream:
    """Copy a stream so that gradients pass it, whatever froze the weights in front of it."""
    hidden = prompt.hidden.detach().clone().requires_grad_()
    features = tuple(layer.detach().clone() for layer in prompt.deepstack)
    return replace(
        prompt, hidden=hidden, deepstack=features, layout=prompt.layout.rows(_all(prompt))
    )


def _all(stream: Stream) -> Tensor:
    return torch.arange(stream.layout.batch, device=stream.hidden.device)


def _emissions(layout: Layout, replies: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Positions that emit the answers' tokens, and the tokens, -1 behind the last; (batch, T)."""
    device, longest = layout.kind.device, max(map(len, replies))
    steps = layout.tokens - 1 + torch.arange(longest, device=device)
    emitting = steps.repeat(len(replies), 1)
    emitting[:, 0] = layout.last_valid()
    padded = [[*reply, *[-1] * (longest - len(reply))] for reply in replies]
    tokens = torch.tensor(padded, device=device)
    return torch.where(tokens >= 0, emitting, 0), tokens


def _scores(
    backbone: Backbone, hidden: Tensor, rows: Tensor, tokens: Tensor, target: Target
) -> Tensor:
    """Sum over the batch of each row's token score; rows do not touch each other's gradients."""
    batch = torch.arange(len(rows), device=rows.device)
    logits = backbone.logits(hidden[batch, rows]).float()
    values = logits if target == "logit" else logits.softmax(-1)
    return (values[batch, tokens.clamp_min(0)] * (tokens >= 0)).sum()


@dataclass
class _Passes:
    """One forward pass, and what its attentions have read and written.

    Attributes
    ----------
    backbone : Backbone
        The model.
    inputs : list of Stream
        Each layer's input.
    values, mixed : list of Tensor, each of shape (batch, tokens, kv heads or heads * head size)
        Each layer's values, and its heads' outputs in front of the output projection.
    hidden : Tensor, shape (batch, tokens, hidden)
        Output of the last layer.
    """

    backbone: Backbone
    inputs: list[Stream] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))

    def rollout(self, score: Tensor, rows: Tensor, rule: RelevanceRule) -> Tensor:
        """Say what one emitting position per row relies on; (batch, tokens)."""
        gradients: Sequence[Tensor | None] = [None] * len(self.mixed)
        if rule.weighting == "gradient":
            gradients = torch.autograd.grad(score, self.mixed, retain_graph=True)
        with torch.no_grad():
            downwards = reversed(list(enumerate(gradients)))
            layers = (self._weighted(layer, found, rule.signs) for layer, found in downwards)
            return chained(layers, rows, self.hidden.shape[1])

    def _weighted(self, layer: int, gradient: Tensor | None, signs: Signs) -> Tensor:
        """Mean over the heads of a layer's attention times gradient; (batch, tokens, tokens)."""
        stream = self.inputs[layer]
        everyone = torch.arange(stream.layout.tokens, device=stream.hidden.device)
        rows = everyone.expand(stream.layout.batch, -1)
        weights = LayerAttention(self.backbone, layer, stream, None).weights(rows).float()
        if gradient is None:
            return weights.mean(1)
        heads = weights.shape[1]
        outgoing = gradient.unflatten(-1, (heads, -1)).transpose(1, 2).float()
        size = outgoing.shape[-1]
        values = self.values[layer].unflatten(-1, (-1, size)).transpose(1, 2).float()
        values = values.repeat_interleave(heads // values.shape[1], 1)
        products = weights * (outgoing @ values.transpose(-1, -2))
        return (products.clamp_min(0) if signs == "positive" else products.abs()).mean(1)


def _forward(decoder: Decoder, stream: Stream) -> _Passes:
    """Run every layer with gradients and note what its attention reads and writes."""
    passes = _Passes(decoder.backbone)
    with _listening(decoder.backbone, passes):
        for layer in range(decoder.layers):
            passes.inputs.append(stream)
            stream = decoder.run(stream, None, layer, layer + 1, select=False)
    passes.hidden = stream.hidden
    return passes


@contextmanager
def _listening(backbone: Backbone, passes: _Passes) -> Iterator[None]:
    """Listen to the value and output projections of every layer's attention."""
    handles = []
    for block in backbone.decoder_layers:
        attention: Any = block.self_attn
        handles += [
            attention.v_proj.register_forward_hook(
                lambda _module, _inputs, output: passes.values.append(output)
            ),
            attention.o_proj.register_forward_pre_hook(
                lambda _module, inputs: passes.mixed.append(inputs[0])
            ),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
