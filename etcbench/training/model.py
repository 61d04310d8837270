"""Backbone and method as one module whose forward gives the loss.

One forward serves everything: pictures through the tower, packed turns through the same layer loop
as at evaluation, under the method's own mask. Cross-entropy is taken at the answers; a method
that brings a `training_module` (ETC) adds its auxiliary loss.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etcbench.attention import LayerAttention
from etcbench.backbones.base import Backbone, Stream, Visual
from etcbench.compressor import Compressor
from etcbench.decoder import Decoder
from etcbench.errors import UsageError
from etcbench.packing import PackedBatch
from etcbench.selection import Kind, Layout
from etcbench.states import PassStates


class CompressionModel(nn.Module):
    """Backbone and method as one module whose forward gives the loss.

    Parameters
    ----------
    backbone : Backbone
        The model; its own weights are trained as far as they require gradients.
    compressor : Compressor
        The method.
    """

    def __init__(self, backbone: Backbone, compressor: Compressor) -> None:
        super().__init__()
        self.model = backbone.model
        self.compressor = compressor.module or nn.Module()
        self.auxiliary: Any = compressor.training_module(backbone.spec)
        self._parts = (backbone, compressor, Decoder(backbone, compressor))
        # Held back from the module's own parameters: it is neither trained nor stored.
        wants_initial = getattr(self.auxiliary, "second_pass", None) == "initial"
        self._initial = _frozen_copy(backbone) if wants_initial else None
        self.grounding = 0.0

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Only what is trained: what a checkpoint has to hold."""
        trained = {name for name, value in self.named_parameters() if value.requires_grad}
        trained |= {name for name, _ in self.named_buffers() if name.startswith("auxiliary")}
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if name in trained}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load what `state_dict` saved; what is not trained is not missing."""
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = sorted(set(found.missing_keys) & set(self.state_dict()))
        if strict and (missing or found.unexpected_keys):
            raise RuntimeError(f"missing {missing}, unexpected {found.unexpected_keys}")
        return type(found)(missing, found.unexpected_keys)

    def forward(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Compute the loss of a packed batch.

        Returns
        -------
        dict of str to Tensor
            ``loss``; its parts ``ce`` and, with an auxiliary loss, ``auxiliary`` (weighted) and
            what that loss logs; ``accuracy`` of the answer tokens under teacher forcing.
        """
        backbone, compressor, decoder = self._parts
        if (own := compressor.objective(self, batch)) is not None:
            return own
        split = self.auxiliary.layer if self.auxiliary is not None else 0
        visual = self._visual(batch)
        if not batch.labels.numel():
            naming = self._naming(batch, visual)
            return {"loss": self.grounding * naming, "naming": naming.detach()}
        embedded = self._embed(batch, visual, backbone, compressor.learned_tokens())
        inputs = decoder.run(embedded, None, 0, split, select=False)
        outputs = decoder.run(inputs, None, split, decoder.layers, select=False)
        count = batch.labels.shape[1]
        wanted = batch.labels >= 0
        logits = backbone.logits(outputs.hidden[:, -count:][wanted.to(outputs.hidden.device)])
        labels = batch.labels[wanted].to(logits.device)
        weights = batch.weights[wanted].to(logits.device)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        ce = (losses * weights).sum()
        with torch.no_grad():
            accuracy = ((logits.argmax(-1) == labels).float() * weights).sum()
        result = {"loss": ce, "ce": ce.detach(), "accuracy": accuracy}
        if self.grounding and visual is not None and batch.shown is not None:
            naming = self._naming(batch, visual)
            result |= {"loss": result["loss"] + self.grounding * naming, "naming": naming.detach()}
        if self.auxiliary is not None and visual is not None:
            parts = self.auxiliary(batch, self._observed(batch, visual, backbone, inputs, outputs))
            value = parts.pop("loss")
            result |= {"loss": result["loss"] + value, "auxiliary": value.detach(), **parts}
        return result

    @torch.no_grad()
    def start_auxiliary(self, batch: PackedBatch) -> None:
        """Let the auxiliary loss set its start by a batch, which must be the same in all processes.

        Does nothing once it has started.
        """
        if self.auxiliary is not None and not self.auxiliary.started:
            self.train()(batch)

    def _observed(
        self, batch: PackedBatch, visual: Visual, backbone: Backbone, inputs: Stream, final: Stream
    ) -> PassStates:
        """Show the auxiliary loss the samples with a picture, which come first."""
        rows = torch.arange(len(visual.grid), device=inputs.hidden.device)
        inputs = inputs.rows(rows)

        def again(initial: bool) -> PassStates:
            with torch.no_grad():
                return self._uncompressed(_first(batch, len(rows)), None if initial else visual)

        return PassStates(
            hidden=inputs.hidden,
            outputs=final.hidden[rows],
            layout=inputs.layout,
            grid=visual.grid,
            attention=LayerAttention(backbone, self.auxiliary.layer, inputs, None),
            norm=backbone.norm,
            again=again,
        )

    def _uncompressed(self, batch: PackedBatch, visual: Visual | None) -> PassStates:
        """Run samples without learned tokens and bottleneck; None: with the initial weights."""
        backbone, compressor, _ = self._parts
        if visual is None:
            assert self._initial is not None and batch.pixels is not None
            backbone = self._initial
            visual = backbone.visual(batch.pixels, compressor)
        learned = compressor.learned_tokens()
        stream = self._embed(batch, visual, backbone, None if learned is None else learned[:0])
        plain = Decoder(backbone, Compressor())
        inputs = plain.run(stream, None, 0, self.auxiliary.layer, select=False)
        final = plain.run(inputs, None, self.auxiliary.layer, plain.layers, select=False)
        return self._observed(batch, visual, backbone, inputs, final)

    def _naming(self, batch: PackedBatch, visual: Visual | None) -> Tensor:
        """Cross-entropy of the visual embeddings, read as words, against what they show."""
        if visual is None or batch.shown is None:
            raise UsageError("a stage of 0 turns names pictures; its data must say what they show")
        named = self._parts[0].logits(visual.embeds).float().flatten(0, 1)
        return F.cross_entropy(named, batch.shown.flatten().to(named.device))

    def _visual(self, batch: PackedBatch) -> Visual | None:
        backbone, compressor, _ = self._parts
        return None if batch.pixels is None else backbone.visual(batch.pixels, compressor)

    def _embed(
        self, batch: PackedBatch, shown: Visual | None, backbone: Backbone, learned: Tensor | None
    ) -> Stream:
        visual: list[Visual] = []
        if shown is not None:
            visual = [_with_blind_rows(shown, len(batch.prompts) - len(shown.grid))]
        prefix = backbone.assemble(batch.prompts, visual, learned)
        text = backbone.text(batch.text, Kind.SUFFIX)
        turns = batch.turns.to(text.hidden.device)
        start = prefix.next_position[None, :, None]
        positions = start + batch.offsets.to(turns.device)[None]
        layout = Layout.build(
            text.layout.kind.masked_fill(turns < 0, int(Kind.PAD)),
            positions.expand(backbone.planes, -1, -1),
            turn=turns,
        )
        return Stream.cat([prefix, Stream(text.hidden, layout)])


def _first(batch: PackedBatch, rows: int) -> PackedBatch:
    """Take the first samples, which are those with a picture."""
    tensors = ("labels", "weights", "turns", "offsets", "instruction")
    return replace(
        batch,
        prompts=batch.prompts[:rows],
        text=batch.text[:rows],
        **{name: getattr(batch, name)[:rows] for name in tensors},
    )


def _frozen_copy(backbone: Backbone) -> Backbone:
    """Copy a backbone's weights as they are, for a teacher that never changes."""
    return replace(backbone, model=copy.deepcopy(backbone.model).requires_grad_(False).eval())


def _with_blind_rows(visual: Visual, rows: int) -> Visual:
    """Append rows that have no picture."""
    if not rows:
        return visual
    return Visual(
        F.pad(visual.embeds, (0, 0, 0, 0, 0, rows)),
        F.pad(visual.place, (0, 0, 0, rows), value=-1),
        F.pad(visual.grid, (0, 0, 0, rows)),
        tuple(F.pad(features, (0, 0, 0, 0, 0, rows)) for features in visual.deepstack),
    )
