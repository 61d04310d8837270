"""What the engine asks of a vision-language model; knows no compression method.

A backbone wraps an unmodified transformers model. It turns pictures into tower states and
visual embeddings, prompts into token ids split at the pictures, and exposes the decoder's layers,
rotary table and query/key projections one by one, so that the layer loop (`etcbench.decoder`) can
change the sequence between layers.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from etcbench.backbones.questions import read_questions
from etcbench.backbones.stream import Pixels, Prompt, Stream, Visual
from etcbench.branch import Branch
from etcbench.compressor import Compressor, ModelSpec, PromptLayout, VisionStates
from etcbench.costs import Tower
from etcbench.errors import UsageError
from etcbench.selection import Kind, Layout, Selection


@dataclass
class Backbone(ABC):
    """One loaded model with its processor.

    Attributes
    ----------
    model : nn.Module
        An unmodified transformers model; never patched.
    processor : Any
        Its processor.
    spec : ModelSpec
        Its shape.
    identity : dict
        Where the weights come from: name, and hub revision or content hash.
    options : dict
        Preprocessing choices, recorded in the manifest.
    """

    model: Any
    processor: Any
    spec: ModelSpec
    identity: dict[str, str]
    options: dict[str, str] = field(default_factory=dict)

    model_type: ClassVar[str]

    @classmethod
    @abstractmethod
    def spec_of(cls, config: Any, name: str) -> ModelSpec:
        """Read the shape from a transformers config."""

    @classmethod
    @abstractmethod
    def tower_of(cls, config: Any, grid: tuple[int, int]) -> Tower:
        """Price the vision side for a picture of ``grid`` (rows, columns) visual tokens."""

    @classmethod
    def raster_of(cls, config: Any, width: int, height: int) -> tuple[int, int]:
        """Raster (rows, columns) of the visual tokens of a picture of so many pixels.

        Known without a processor, so limits on a picture's area are not applied.
        """
        grid = cls.spec_of(config, "").grid
        assert grid is not None
        return grid

    @classmethod
    def default_options(cls) -> dict[str, tuple[str, ...]]:
        """Map each preprocessing option to its accepted values, default first."""
        return {}

    # Pictures ---------------------------------------------------------------------------------

    @abstractmethod
    def preprocess(self, pictures: Sequence[Image.Image], keys: list[str]) -> Pixels:
        """Turn RGB pictures into tower inputs on the CPU."""

    def view(self, picture: Image.Image) -> Image.Image:
        """Show what the tower sees of a picture: all of it, unless a family pads or crops."""
        return picture

    @abstractmethod
    def encode(self, pixels: Pixels, grid: Tensor | None = None) -> VisionStates:
        """Run the vision tower.

        Parameters
        ----------
        pixels : Pixels
            Preprocessed pictures.
        grid : Tensor, optional, long, shape (pictures, 2)
            Raster to which each picture is reduced first.
        """

    @abstractmethod
    def project(self, vision: VisionStates, selection: Selection | None) -> Visual:
        """Select (None: all patches) and project tower features to visual embeddings."""

    def look(self, pixels: Pixels, compressor: Compressor) -> VisionStates:
        """Run the tower on pictures, reduced as far as the method wants them to be."""
        rasters = [(int(rows), int(columns)) for rows, columns in pixels.grid.tolist()]
        grid = torch.tensor([compressor.image_grid(raster) or raster for raster in rasters])
        return self.encode(pixels, None if torch.equal(grid, pixels.grid) else grid)

    def visual(
        self,
        pixels: Pixels | VisionStates,
        compressor: Compressor,
        asked: Sequence[tuple[int, str]] | None = None,
    ) -> Visual:
        """Encode pictures and apply whatever the method does in front of the decoder.

        Parameters
        ----------
        pixels : Pixels or VisionStates
            Each picture once; or what the tower has made of them (`look`).
        compressor : Compressor
            The method.
        asked : sequence of tuple, optional
            Number of a picture and the question on it, for every set of visual tokens that is
            wanted; default: one set per picture, which methods that read the question refuse.

        Raises
        ------
        UsageError
            If the method reads the question and is not told.
        """
        vision = self.look(pixels, compressor) if isinstance(pixels, Pixels) else pixels
        index = None if asked is None else torch.tensor([n for n, _ in asked], device=self.device)
        if compressor.resamples and compressor.reuse == "vision":
            if asked is None or index is None:
                raise UsageError(f"{compressor.name()} reads the question; none is given")
            return self.resampled(vision.rows(index), compressor, [text for _, text in asked])
        visual = self._once(vision, compressor)
        return visual if index is None else visual.rows(index)

    def resampled(self, vision: VisionStates, compressor: Compressor, asked: list[str]) -> Visual:
        """Let the method make the visual tokens; ``asked`` may be empty where it does not read it.

        Raises
        ------
        UsageError
            If the tower's output is not one raster for each picture.
        """
        return Visual.of(compressor.resample(vision, read_questions(self, asked)), self.dtype)

    def _once(self, vision: VisionStates, compressor: Compressor) -> Visual:
        """Visual tokens that do not depend on the question."""
        if compressor.resamples:
            return self.resampled(vision, compressor, [])
        visual = self.project(vision, compressor.select_vision(vision))
        selection = compressor.select_embeds(visual.embeds, visual.grid, vision.shown)
        return visual if selection is None else visual.select(selection)

    # Text -------------------------------------------------------------------------------------

    @abstractmethod
    def prompt(self, question: str, pictures: int, layout: PromptLayout = "standard") -> Prompt:
        """Wrap a question in the model's conversation template and tokenize it."""

    def continuation(self, question: str, layout: PromptLayout = "standard") -> tuple[int, ...]:
        """Tokenize what follows an answer's end token in a conversation, up to the next answer."""
        said = "first answer of the conversation"
        turns = (("user", "?"), ("assistant", said), ("user", question))
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns
        ]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        tokenizer = self.processor.tokenizer
        tail = text.partition(said)[2].lstrip().removeprefix(tokenizer.eos_token)
        return tuple(tokenizer(tail, add_special_tokens=False)["input_ids"])

    @property
    def eos_ids(self) -> set[int]:
        """Token ids that end an answer."""
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.processor.tokenizer.eos_token_id
        return set(ends) if isinstance(ends, list | tuple) else {ends}

    def detokenize(self, ids: Sequence[int]) -> str:
        """Decode an answer, without special tokens and outer blanks."""
        return self.processor.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    # Sequences --------------------------------------------------------------------------------

    def assemble(
        self, prompts: Sequence[Prompt], visual: Sequence[Visual], learned: Tensor | None
    ) -> Stream:
        """Lay out everything up to the last visual or learned token, padded on the right.

        Parameters
        ----------
        prompts : sequence of Prompt
            One per row; all that have pictures have the same number of them.
        visual : sequence of Visual
            The pictures in order: entry ``i`` holds the ``i``-th picture of every row, all
            padding where a row has none.
        learned : Tensor or None, shape (M, hidden)
            Embeddings of learned tokens, appended behind the bridge of rows with pictures.
        """
        device = self.device
        parts: list[Stream] = []
        for number, picture in enumerate(visual):
            chunks = [p.chunks[number] if p.chunks else () for p in prompts]
            parts.append(self.text(chunks, Kind.PREFIX))
            place = picture.place
            kind = torch.where(place >= 0, int(Kind.VISUAL), int(Kind.PAD))
            image = torch.full_like(place, number).masked_fill(place < 0, -1)
            layout = Layout.build(
                kind.to(torch.int8),
                picture.steps(self.planes),
                image=image,
                place=place,
                turn=picture.turn,
            )
            parts.append(Stream(picture.embeds, layout, picture.deepstack))
        if learned is not None and visual:
            parts.append(self.text([p.bridge for p in prompts], Kind.PREFIX))
            seen = torch.tensor([bool(p.chunks) for p in prompts], device=device)[:, None]
            places = torch.arange(len(learned), device=device).expand(len(prompts), -1)
            kind = torch.where(seen, int(Kind.LEARNED), int(Kind.PAD)).expand_as(places)
            place = places.masked_fill(~seen, -1)
            layout = Layout.build(kind.to(torch.int8), self._unset(kind), place=place)
            tokens = learned.to(self.dtype).expand(len(prompts), *learned.shape)
            parts.append(Stream(tokens, layout))
        if not parts:
            return self.text([() for _ in prompts], Kind.PREFIX)
        stream = Stream.cat(parts)
        stream = stream.select(Selection.from_mask(stream.layout.valid))
        extents = [picture.extent for picture in visual]
        stream.layout.positions, stream.end = self.positions(stream.layout, extents)
        return stream

    def _unset(self, kind: Tensor) -> Tensor:
        """Zeros for positions that are numbered once the sequence is complete."""
        return kind.new_zeros((self.planes, *kind.shape), dtype=torch.long)

    def text(self, ids: Sequence[Sequence[int]], kind: Kind) -> Stream:
        """Embed token ids, padded on the right, with positions 0, 1, ... on every plane."""
        width = max((len(row) for row in ids), default=0)
        padded = torch.zeros(len(ids), width, dtype=torch.long)
        kinds = torch.full((len(ids), width), int(Kind.PAD), dtype=torch.int8)
        for number, row in enumerate(ids):
            padded[number, : len(row)] = torch.tensor(row, dtype=torch.long)
            kinds[number, : len(row)] = int(kind)
        steps = torch.arange(width, device=self.device).expand(self.planes, len(ids), width)
        layout = Layout.build(kinds.to(self.device), steps.clone())
        return Stream(self.embed_tokens(padded.to(self.device)), layout)

    def continue_text(self, ids: Sequence[Sequence[int]], start: Tensor) -> Stream:
        """Embed the text behind the image block; ``start`` is each row's next free position."""
        stream = self.text(ids, Kind.SUFFIX)
        stream.layout.positions = stream.layout.positions + start[None, :, None]
        return stream

    @property
    def planes(self) -> int:
        """Number of rotary position planes."""
        return self.spec.planes

    def positions(self, layout: Layout, extents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Assign positions to a prefix; 1-D: consecutive ones, whatever a method has left out.

        Sets of tokens for packed questions stand side by side, all from the same position on.

        Parameters
        ----------
        layout : Layout
            A complete prefix; the positions of visual tokens count from their picture's first.
        extents : sequence of Tensor, each long, of shape (batch,)
            Positions that every row's first, second, ... picture takes up where its tokens have
            places of their own.

        Returns
        -------
        tuple of Tensor
            Positions, shape (planes, batch, tokens), and each row's next one, shape (batch,).
        """
        turn, counts = layout.turn.long(), layout.valid.long().cumsum(1)
        one_set = (layout.valid & (turn == 0)).sum(1, keepdim=True)
        counts = counts - one_set * turn.clamp_min(0)
        end = (layout.valid & (turn <= 0)).sum(1)
        return (counts - 1).clamp_min(0)[None], end

    # Decoder ----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the language model's embeddings."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def attention(self) -> str:
        """Attention backend, e.g. ``"sdpa"``."""
        return str(self.model.config._attn_implementation)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Embed token ids."""
        return self.model.get_input_embeddings()(ids)

    @property
    @abstractmethod
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder layers."""

    @abstractmethod
    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine table for positions of shape (planes, batch, tokens)."""

    def block(self, layer: int | nn.Module) -> Any:
        """Look up a decoder layer by number; a layer of a branch is given itself."""
        return self.decoder_layers[layer] if isinstance(layer, int) else layer

    def branch(self, start: int, depth: int) -> Branch:
        """Copy layers ``start`` to ``start + depth - 1``, the final norm and the head."""
        layers = copy.deepcopy(self.decoder_layers[start : start + depth])
        for number, layer in enumerate(layers):
            attention: Any = layer.self_attn
            attention.layer_idx = number
        norm = copy.deepcopy(self.model.get_decoder().norm)
        return Branch(start, layers, norm, copy.deepcopy(self.model.get_output_embeddings()))

    def run_layer(
        self,
        layer: int | nn.Module,
        stream: Stream,
        mask: Tensor | None,
        rotary: Any,
        cache: Any = None,
    ) -> Tensor:
        """Run one decoder layer; appends keys and values to ``cache`` when one is given.

        Parameters
        ----------
        layer : int or nn.Module
            See `block`.
        mask : Tensor or None, bool, shape (batch, 1, queries, keys)
            True = may attend; None for plain causal attention.
        """
        if mask is not None and self.attention == "eager":
            lowest = torch.finfo(stream.hidden.dtype).min
            mask = torch.zeros_like(mask, dtype=stream.hidden.dtype).masked_fill(~mask, lowest)
        hidden: Tensor = self.block(layer)(
            stream.hidden,
            attention_mask=mask,
            position_embeddings=rotary,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return hidden

    def normed(self, layer: int | nn.Module, hidden: Tensor) -> Tensor:
        """Apply the norm in front of a layer's attention."""
        normed: Tensor = self.block(layer).input_layernorm(hidden)
        return normed

    @abstractmethod
    def queries(self, layer: int | nn.Module, normed: Tensor, rotary: Any) -> Tensor:
        """Post-rotary queries of a layer from its normed input.

        Returns
        -------
        Tensor
            Shape (batch, heads, tokens, head size).
        """

    @abstractmethod
    def keys(self, layer: int | nn.Module, normed: Tensor, rotary: Any) -> Tensor:
        """Post-rotary keys of a layer from its normed input.

        Returns
        -------
        Tensor
            Shape (batch, kv heads, tokens, head size).
        """

    @abstractmethod
    def norm(self, hidden: Tensor) -> Tensor:
        """Apply the final norm of the decoder."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the final norm and the language-model head."""
        return self.model.get_output_embeddings()(self.norm(hidden))
