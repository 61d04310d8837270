"""Qwen3-VL (`Qwen3VLForConditionalGeneration`): dynamic resolution, DeepStack, 3-axis M-RoPE.

A picture gives as many tokens as its size asks for. The tower merges every 2x2 patches into one
token, and what a compressor selects from are these merged tokens. Tapped tower layers give each
token further features, which are added behind the first decoder layers (DeepStack) and follow
every selection. Positions have three axes (t, h, w); a surviving visual token keeps its own, and
text resumes where it would behind the whole picture (spec selective 1.10, 4.8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    apply_rotary_pos_emb_vision,
    rotate_half,
)

from etcbench.backbones.base import Backbone
from etcbench.backbones.stream import Pixels, Prompt, Visual
from etcbench.compressor import ModelSpec, PromptLayout
from etcbench.costs import Tower
from etcbench.errors import UsageError
from etcbench.selection import Kind, Layout, Selection
from etcbench.states import VisionStates


@dataclass
class Qwen3VLBackbone(Backbone):
    """Qwen3-VL, dense text models."""

    model_type: ClassVar[str] = "qwen3_vl"

    @classmethod
    def spec_of(cls, config: Any, name: str) -> ModelSpec:
        """Read the shape from a `Qwen3VLConfig`; the picture decides over the visual tokens."""
        text, vision = config.text_config, config.vision_config
        return ModelSpec(
            name=name,
            family=cls.model_type,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            mlp=text.intermediate_size,
            visual_tokens=None,
            grid=None,
            tower_layers=vision.depth,
            tower_hidden=vision.hidden_size,
            tower_heads=vision.num_heads,
            has_cls=False,
            planes=3,
            projected=True,
            taps=len(vision.deepstack_visual_indexes),
        )

    @classmethod
    def tower_of(cls, config: Any, grid: tuple[int, int]) -> Tower:
        """Price the ViT with its merger, which projects, and one merger per DeepStack tap."""
        vision = config.vision_config
        unit, d, tokens = vision.spatial_merge_size**2, vision.hidden_size, grid[0] * grid[1]
        patches = tokens * unit
        layer = patches * (4 * d * d + 2 * d * vision.intermediate_size)
        attention = vision.depth * 2 * patches**2 * d
        pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        merger = unit * d * (unit * d + vision.out_hidden_size)
        mergers = 1 + len(vision.deepstack_visual_indexes)
        return Tower(
            encode=patches * (pixels * d)
            + vision.depth * layer
            + attention
            + tokens * mergers * merger,
            attention=attention,
            project=0,
            tokens=tokens,
            row_setup=3 * patches * d * d,
            row=tokens * unit**2 * d,
            keys=0,
            key_size=d // vision.num_heads,
        )

    @classmethod
    def raster_of(cls, config: Any, width: int, height: int) -> tuple[int, int]:
        """Round each side to whole tokens."""
        side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        return max(round(height / side), 1), max(round(width / side), 1)

    # Pictures ---------------------------------------------------------------------------------

    @property
    def _merge(self) -> int:
        """Patches along one side of a token."""
        return int(self.model.config.vision_config.spatial_merge_size)

    def preprocess(self, pictures: Sequence[Image.Image], keys: list[str]) -> Pixels:
        """Resize each picture to whole tokens, normalise and cut into patches."""
        batch = self.processor.image_processor(images=list(pictures), return_tensors="pt")
        tensors = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
        return Pixels(tensors, tensors["image_grid_thw"][:, 1:] // self._merge, keys)

    def encode(self, pixels: Pixels, grid: Tensor | None = None) -> VisionStates:
        """Run the tower on the patches of all pictures; attention stays within each picture."""
        patches = pixels.tensors["pixel_values"].to(self.device)
        shapes, rasters = pixels.tensors["image_grid_thw"], pixels.grid
        if grid is not None:
            patches, shapes = self._reduced(patches, shapes, grid), shapes.clone()
            shapes[:, 1:], rasters = grid * self._merge, grid
        tower = self.model.model.visual
        last: dict[str, Any] = {}

        def note(block: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            last.update(named, hidden=inputs[0])

        handle = tower.blocks[-1].register_forward_pre_hook(note, with_kwargs=True)
        try:
            out = tower(patches.to(self.dtype), grid_thw=shapes.to(self.device))
        finally:
            handle.remove()
        counts = rasters.prod(-1).tolist()
        attention = _TowerAttention(
            tower.blocks[-1], last["hidden"], last["position_embeddings"], counts, self._merge**2
        )

        def padded(tokens: Tensor) -> Tensor:
            return pad_sequence(list(tokens.split(counts)), batch_first=True)

        return VisionStates(
            padded(out.pooler_output),
            rasters.to(self.device),
            pixels.keys,
            False,
            attention.rows,
            attention.keys,
            tuple(padded(features) for features in out.deepstack_features),
        )

    def _reduced(self, patches: Tensor, shapes: Tensor, grid: Tensor) -> Tensor:
        """Resize each picture, given as patches, to the raster that is wanted of it."""
        vision, side = self.model.config.vision_config, self._merge
        frames, channels, size = vision.temporal_patch_size, vision.in_channels, vision.patch_size
        resized = []
        parts = patches.split(shapes.prod(-1).tolist())
        for part, (_, height, width), wanted in zip(parts, shapes.tolist(), grid, strict=True):
            # token row, token column, patch row, patch column, channel, frame, pixel row and column
            blocks = part.view(
                height // side, width // side, side, side, channels, frames, size, size
            )
            image = blocks.permute(5, 4, 0, 2, 6, 1, 3, 7).reshape(
                frames, channels, height * size, width * size
            )
            rows, columns = wanted.tolist()
            image = F.interpolate(
                image, (rows * side * size, columns * side * size), mode="bicubic", antialias=True
            )
            blocks = image.view(frames, channels, rows, side, size, columns, side, size)
            resized.append(blocks.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(-1, part.shape[1]))
        return torch.cat(resized)

    def project(self, vision: VisionStates, selection: Selection | None) -> Visual:
        """Select; the tower's merger has already projected."""
        places = torch.arange(vision.features.shape[1], device=self.device)
        counts = vision.grid.prod(-1, keepdim=True)
        visual = Visual(
            vision.features.to(self.dtype),
            torch.where(places < counts, places, -1),
            vision.grid,
            tuple(features.to(self.dtype) for features in vision.deepstack),
        )
        return visual if selection is None else visual.select(selection)

    # Text -------------------------------------------------------------------------------------

    def prompt(self, question: str, pictures: int, layout: PromptLayout = "standard") -> Prompt:
        """Wrap a question in the processor's chat template.

        Learned tokens stand between the last picture and its end marker, or behind the marker where
        ``layout`` is ``"marker_first"`` (spec abstractive 1.4).
        """
        if layout == "image_first":
            raise UsageError(f"{self.spec.name} knows no {layout!r} prompt; use prompt=standard")
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        message = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(message, add_generation_prompt=True)
        ids = self.processor.tokenizer(text)["input_ids"]
        prompt = Prompt.split(ids, self.model.config.image_token_id, pictures)
        if layout == "marker_first" and pictures:
            prompt = replace(prompt, bridge=prompt.after[:1], after=prompt.after[1:])
        return prompt

    # Sequences --------------------------------------------------------------------------------

    def positions(self, layout: Layout, extents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Assign M-RoPE positions to a prefix.

        Text has the same position on all axes. A picture that starts at p has t = p, h = p + row,
        w = p + column, and text resumes at p + max(rows, columns) (spec abstractive 1.4).
        Learned tokens behind it count on along h and w while t stays; text resumes behind the last.
        """
        visual = layout.is_kind(Kind.VISUAL)
        none = layout.place.new_zeros(layout.batch, dtype=torch.long)
        taken = torch.stack([none, *extents], -1).cumsum(-1)
        image = layout.image.long()
        passed = torch.where(visual, image, image.cummax(1).values + 1)  # pictures in front
        text = (layout.valid & ~visual).long().cumsum(1)  # the token itself included
        start = text - (~visual).long() + taken.gather(1, passed)
        _, step_h, step_w = torch.where(visual, layout.positions, 0)
        back = torch.where(layout.is_kind(Kind.LEARNED), layout.place.long(), 0)
        positions = torch.stack([start - back, start + step_h, start + step_w])
        seen = image.amax(1, keepdim=True) + 1
        end = text[:, -1] + taken.gather(1, seen)[:, 0]
        return positions.clamp_min(0), end

    # Decoder ----------------------------------------------------------------------------------

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.model.model.language_model.layers

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, interleaved from the three position planes."""
        return self.model.model.language_model.rotary_emb(hidden, position_ids=positions)

    def queries(self, layer: int | nn.Module, normed: Tensor, rotary: Any) -> Tensor:
        """Post-rotary queries of one layer, normalised per head."""
        return self._rotated(layer, "q", normed, rotary)

    def keys(self, layer: int | nn.Module, normed: Tensor, rotary: Any) -> Tensor:
        """Post-rotary keys of one layer, normalised per head."""
        return self._rotated(layer, "k", normed, rotary)

    def _rotated(self, layer: int | nn.Module, which: str, normed: Tensor, rotary: Any) -> Tensor:
        attention = self.block(layer).self_attn
        heads = getattr(attention, f"{which}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
        heads = getattr(attention, f"{which}_norm")(heads)
        cosine, sine = (table.unsqueeze(2) for table in rotary)
        rotated: Tensor = heads * cosine + rotate_half(heads) * sine
        return rotated.transpose(1, 2)

    def norm(self, hidden: Tensor) -> Tensor:
        """Apply the final norm of the decoder."""
        return self.model.model.language_model.norm(hidden)


class _TowerAttention:
    """Attention of the tower's last block, recomputed where a method asks, per merged token.

    Parameters
    ----------
    block : nn.Module
        The block.
    hidden : Tensor, shape (patches, width)
        Its input, all pictures one after the other, the patches of a token side by side.
    rotary : tuple of Tensor
        Cosine and sine of every patch.
    counts : list of int
        Tokens of each picture.
    unit : int
        Patches of a token.
    """

    def __init__(
        self, block: Any, hidden: Tensor, rotary: Any, counts: list[int], unit: int
    ) -> None:
        self.block, self.hidden, self.rotary = block, hidden, rotary
        self.counts, self.unit = counts, unit

    @cached_property
    def _queries_keys(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Post-rotary queries and keys of each picture, (tokens, unit, heads, head size)."""
        attention = self.block.attn
        packed = attention.qkv(self.block.norm1(self.hidden))
        query, key, _ = packed.unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        query, key = (
            turned.unflatten(0, (-1, self.unit)).split(self.counts)
            for turned in apply_rotary_pos_emb_vision(query, key, *self.rotary)
        )
        return query, key

    def rows(self, rows: Tensor) -> Tensor:
        """Attention of the asked tokens, shape (pictures, heads, rows, tokens).

        From a token to a token: summed over the patches that are seen, averaged over the patches
        that look. Each row sums to one over its own picture; rows beyond a picture are zero.
        """
        attention = self.block.attn
        width = max(self.counts)
        shape = (len(self.counts), attention.num_heads, len(rows), width)
        out = self.hidden.new_zeros(shape)
        for picture, (query, key) in enumerate(zip(*self._queries_keys, strict=True)):
            count = len(key)
            own = rows < count
            asked = query[rows[own]] * attention.scaling
            scores = torch.einsum("ruhd,kvhd->hrukv", asked, key).float()
            weights = scores.flatten(-2).softmax(-1).view_as(scores)
            out[picture][:, own, :count] = weights.sum(-1).mean(2).to(out.dtype)
        return out

    def keys(self) -> Tensor:
        """Post-rotary keys averaged over heads and patches, shape (pictures, tokens, head size)."""
        keys = self._queries_keys[1]
        return pad_sequence([key.mean((1, 2)) for key in keys], batch_first=True)


BACKBONE = Qwen3VLBackbone
