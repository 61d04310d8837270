"""Backbone and method as one module whose forward gives the loss.

One forward serves everything: pictures through the tower, packed turns through the same layer loop
as at evaluation, under the method's own mask. Cross-entropy is taken at the answers; a method
that brings a `training_module` (ETC) adds its auxiliary loss.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
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
from etcbench.training.sharding import gathered, is_unit, undivided
from etcbench.training.stage import part_of


class TrainingDecoder(Decoder):
    """The layer loop on a model that may be divided."""

    def attention(self, layer: int | nn.Module, inputs: Stream) -> LayerAttention:
        """Attention of a layer on its input.

        Raises
        ------
        UsageError
            If FSDP has divided the layer: its weights would be missing, in the backward pass too.
        """
        if is_unit(self.backbone.block(layer)):
            raise UsageError(
                f"{self.compressor.name()} trains on the attention of decoder layers, which FSDP "
                "divides; train it with DDP or DeepSpeed ZeRO-2"
            )
        return super().attention(layer, inputs)


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
        self._parts = (backbone, compressor, TrainingDecoder(backbone, compressor))
        self.model = backbone.model
        # What accelerate takes for FSDP's units where its config names none.
        self._no_split_modules = [self.unit]
        self.compressor = compressor.module or nn.Module()
        self.auxiliary: Any = compressor.training_module(backbone.spec)
        # Held back from the module's own parameters: it is neither trained nor stored.
        wants_initial = getattr(self.auxiliary, "second_pass", None) == "initial"
        self._initial = _frozen_copy(backbone) if wants_initial else None
        self.grounding = 0.0
        # Set by the trainer: which of the method's objectives, and the share of its steps done.
        self.phase: str | None = None
        self.progress = 0.0

    def trained_names(self) -> list[str]:
        """Parameters that are trained now, and the buffers of what exists only in training."""
        names = [name for name, value in self.named_parameters() if value.requires_grad]
        return names + [name for name, _ in self.named_buffers() if part_of(name) == "auxiliary"]

    def trained_state(self) -> dict[str, Tensor]:
        """Weights that are trained now, by name; what a stage has to leave behind."""
        whole = self.state_dict()
        return {name: whole[name].detach().contiguous() for name in self.trained_names()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load what `trained_state` took; what is not trained is not missing."""
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = sorted(set(found.missing_keys) & set(self.trained_names()))
        if strict and (missing or found.unexpected_keys):
            raise RuntimeError(f"missing {missing}, unexpected {found.unexpected_keys}")
        return type(found)(missing, found.unexpected_keys)

    @property
    def config(self) -> SimpleNamespace:
        """What DeepSpeed's automatic settings read; not the model's own: Trainer writes to it."""
        return SimpleNamespace(hidden_size=self.backbone.spec.hidden)

    @property
    def unit(self) -> str:
        """Class of the decoder layers, the units by which FSDP divides the model."""
        return type(self.backbone.decoder_layers[0]).__name__

    def tie_weights(self) -> None:
        """Tie again what a move between devices has separated; accelerate asks for it."""
        self.model.tie_weights()

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Store layer inputs only and compute the rest again in the backward pass."""
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        (enable or self.model.gradient_checkpointing_enable)()

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
            return {**own, "loss": self._anchored(own["loss"] * batch.shares.answers)}
        visual = self._visual(batch)
        if not batch.labels.numel():
            naming = self._naming(batch, visual)
            loss = self.grounding * naming * batch.shares.pictures
            return {"loss": loss, "naming": naming.detach()}
        embedded = self._embed(batch, visual, backbone, compressor.learned_tokens())
        inputs, outputs = self._through(decoder, embedded)
        result = self.answer_loss(backbone.logits(self.answer_states(outputs, batch)), batch)
        loss = result.pop("loss") * batch.shares.answers
        if self.grounding and visual is not None and batch.shown is not None:
            naming = self._naming(batch, visual)
            loss = loss + self.grounding * naming * batch.shares.pictures
            result["naming"] = naming.detach()
        if self.auxiliary is not None and visual is not None:
            observed = self._observed(batch, visual, backbone, inputs, outputs)
            if (second := getattr(self.auxiliary, "second_pass", None)) is not None:
                # Before the weights are held: FSDP lets go of a layer's when it has run.
                observed = _passed_again(observed, second == "initial")
            # The target may ask for attention rows, from that layer's own weights.
            with gathered(backbone.decoder_layers[self.auxiliary.layer]):
                parts = self.auxiliary(batch, observed)
            value = parts.pop("loss")
            loss = loss + value * batch.shares.samples
            result |= {"auxiliary": value.detach(), **parts}
        return {"loss": self._anchored(loss), **result}

    @property
    def backbone(self) -> Backbone:
        """The model that the method compresses for."""
        return self._parts[0]

    @property
    def method(self) -> Compressor:
        """The method."""
        return self._parts[1]

    @property
    def decoder(self) -> Decoder:
        """The layer loop of backbone and method."""
        return self._parts[2]

    @torch.no_grad()
    def frozen(self, batch: PackedBatch, layers: int) -> Stream:
        """Run the first ``layers`` decoder layers on a batch, for methods that leave them be."""
        backbone, compressor, decoder = self._parts
        stream = self._embed(batch, self._visual(batch), backbone, compressor.learned_tokens())
        return decoder.run(stream, None, 0, layers, select=False)

    def answer_states(self, stream: Stream, batch: PackedBatch) -> Tensor:
        """Take the states that must predict an answer token, shape (answer tokens, hidden)."""
        wanted = (batch.labels >= 0).to(stream.hidden.device)
        return stream.hidden[:, -batch.labels.shape[1] :][wanted]

    def answer_loss(self, logits: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        """Cross-entropy at the answers.

        Parameters
        ----------
        logits : Tensor, shape (answer tokens, vocabulary)
            From `answer_states`.

        Returns
        -------
        dict of str to Tensor
            ``loss``; for the log ``ce``, the same, and ``accuracy``.
        """
        wanted = batch.labels >= 0
        labels = batch.labels[wanted].to(logits.device)
        weights = batch.weights[wanted].to(logits.device)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        ce = (losses * weights).sum()
        with torch.no_grad():
            accuracy = ((logits.argmax(-1) == labels).float() * weights).sum()
        return {"loss": ce, "ce": ce.detach(), "accuracy": accuracy}

    def _anchored(self, loss: Tensor) -> Tensor:
        """Give every parameter of the method a gradient, be it zero.

        Processes that train together wait for each other's gradients; a batch that does not need
        a part of the method must not leave them waiting. Units of FSDP wait for each other anyway.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return loss
        for module in (self.compressor, self.auxiliary):
            for owner in () if module is None else undivided(module):
                for name, parameter in owner.named_parameters(recurse=False):
                    if parameter.requires_grad:
                        # Asked for by name: only so does ZeRO-3 gather what it has divided.
                        loss = loss + 0.0 * getattr(owner, name).sum()
        return loss

    @torch.no_grad()
    def start_auxiliary(self, batch: PackedBatch) -> None:
        """Let the auxiliary loss set its start by a batch, which must be the same in all processes.

        Does nothing once it has started.
        """
        if self.auxiliary is not None and not self.auxiliary.started:
            self.train()(batch)

    def _through(self, decoder: Decoder, stream: Stream) -> tuple[Stream, Stream]:
        """Run all layers; give the input of the layer that the auxiliary loss names, too."""
        held = [stream]
        wanted = None if self.auxiliary is None else self.auxiliary.layer

        def watch(layer: int, inputs: Stream) -> None:
            if layer == wanted:
                held.append(inputs)

        final = decoder.run(stream, None, 0, decoder.layers, select=False, watch=watch)
        return held[-1], final

    def _observed(
        self, batch: PackedBatch, visual: Visual, backbone: Backbone, inputs: Stream, final: Stream
    ) -> PassStates:
        """Show the auxiliary loss the samples with a picture, which come first."""
        count = len(visual.grid)
        if count < inputs.layout.batch:
            inputs = inputs.rows(torch.arange(count, device=inputs.hidden.device))

        def again(initial: bool) -> PassStates:
            with torch.no_grad():
                return self._uncompressed(_first(batch, count), None if initial else visual)

        return PassStates(
            hidden=inputs.hidden,
            outputs=final.hidden[:count],
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
            self._initial.model.to(backbone.device)
            backbone = self._initial
            visual = backbone.visual(batch.pixels, compressor)
        learned = compressor.learned_tokens()
        stream = self._embed(batch, visual, backbone, None if learned is None else learned[:0])
        inputs, final = self._through(Decoder(backbone, Compressor()), stream)
        return self._observed(batch, visual, backbone, inputs, final)

    def _naming(self, batch: PackedBatch, visual: Visual | None) -> Tensor:
        """Cross-entropy of the visual embeddings, read as words, against what they show."""
        if visual is None or batch.shown is None:
            raise UsageError("a stage of 0 turns names pictures; its data must say what they show")
        named = self._parts[0].logits(visual.embeds).float().flatten(0, 1)
        return F.cross_entropy(named, batch.shown.flatten().to(named.device))

    def _visual(self, batch: PackedBatch) -> Visual | None:
        backbone, compressor, _ = self._parts
        if batch.pixels is None:
            return None
        if not (compressor.resamples and compressor.reuse == "vision"):
            return backbone.visual(batch.pixels, compressor)
        rows = batch.questions[: len(batch.pixels.grid)]
        asked = [(number, text) for number, texts in enumerate(rows) for text in texts]
        return backbone.visual(batch.pixels, compressor, asked).packed([len(row) for row in rows])

    def _embed(
        self, batch: PackedBatch, shown: Visual | None, backbone: Backbone, learned: Tensor | None
    ) -> Stream:
        visual: list[Visual] = []
        if shown is not None:
            visual = [shown.padded(len(batch.prompts) - len(shown.grid))]
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


def _passed_again(states: PassStates, wanted: bool) -> PassStates:
    """Run one second pass now; `again` gives it, and runs the other one if asked."""
    run, found = states.again, states.again(wanted)
    return replace(states, again=lambda initial: found if initial == wanted else run(initial))


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
