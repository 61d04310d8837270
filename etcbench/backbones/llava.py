"""LLaVA-1.5 (`LlavaForConditionalGeneration`): CLIP tower, MLP projector, 1-D RoPE decoder.

The default preprocessing is that of the original LLaVA-1.5 evaluation (spec abstractive 0.5):
the picture is padded to a square with the CLIP mean colour, then resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from etcbench.backbones.base import Backbone
from etcbench.backbones.stream import Pixels, Prompt, Visual
from etcbench.compressor import ModelSpec, PromptLayout, VisionStates
from etcbench.costs import Tower
from etcbench.errors import UsageError
from etcbench.selection import Selection

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# VoCo-LLaMA's template adds three words (spec abstractive 2.2).
SYSTEM_OF_THE_IMAGE = SYSTEM.replace("assistant. The", "assistant of the image. The")


@dataclass
class LlavaBackbone(Backbone):
    """LLaVA-1.5 and models of its shape."""

    model_type: ClassVar[str] = "llava"

    @classmethod
    def spec_of(cls, config: Any, name: str) -> ModelSpec:
        """Read the shape from a `LlavaConfig`."""
        text, vision = config.text_config, config.vision_config
        side = vision.image_size // vision.patch_size
        return ModelSpec(
            name=name,
            family=cls.model_type,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None)
            or text.hidden_size // text.num_attention_heads,
            mlp=text.intermediate_size,
            visual_tokens=side * side,
            grid=(side, side),
            tower_layers=vision.num_hidden_layers,
            tower_hidden=vision.hidden_size,
            tower_heads=vision.num_attention_heads,
            has_cls=True,
        )

    @classmethod
    def tower_of(cls, config: Any, grid: tuple[int, int]) -> Tower:
        """Price CLIP, whose last layers run although LLaVA does not read them."""
        vision, width = config.vision_config, config.text_config.hidden_size
        d, patches = vision.hidden_size, grid[0] * grid[1]
        tokens = patches + 1
        layer = tokens * (4 * d * d + 2 * d * vision.intermediate_size)
        attention = vision.num_hidden_layers * 2 * tokens**2 * d
        embed = patches * vision.num_channels * vision.patch_size**2 * d
        chosen = config.vision_feature_layer
        sources = 1 if isinstance(chosen, int) else len(chosen)
        return Tower(
            encode=embed + vision.num_hidden_layers * layer + attention,
            attention=attention,
            project=width * (sources * d + width),
            tokens=tokens,
            row_setup=tokens * d * d,
            row=d * d + tokens * d,
            keys=tokens * d * d,
            key_size=d // vision.num_attention_heads,
        )

    @classmethod
    def default_options(cls) -> dict[str, tuple[str, ...]]:
        """`image`: pad as LLaVA-1.5 or the processor as it is; `template`: Vicuna v1 or its own."""
        return {"image": ("pad", "processor"), "template": ("vicuna_v1", "chat")}

    # Pictures ---------------------------------------------------------------------------------

    def preprocess(self, pictures: Sequence[Image.Image], keys: list[str]) -> Pixels:
        """Pad to a square (option ``image=pad``), resize and normalise."""
        images = list(pictures)
        if self.options["image"] == "pad":
            mean = self.processor.image_processor.image_mean
            images = [_pad_to_square(image, mean) for image in images]
        batch = self.processor.image_processor(images=images, return_tensors="pt")
        values = batch["pixel_values"]
        patch = self.model.config.vision_config.patch_size
        side = [values.shape[-2] // patch, values.shape[-1] // patch]
        grid = torch.tensor([side] * len(images), dtype=torch.long)
        return Pixels({"pixel_values": values}, grid, keys)

    def view(self, picture: Image.Image) -> Image.Image:
        """Show the square that CLIP sees, padded or cropped."""
        values = self.preprocess([picture], ["view"]).tensors["pixel_values"][0]
        mean, std = (
            torch.tensor(numbers).view(3, 1, 1)
            for numbers in (
                self.processor.image_processor.image_mean,
                self.processor.image_processor.image_std,
            )
        )
        shown = (values * std + mean).clamp(0, 1).mul(255).round().byte()
        return Image.fromarray(shown.permute(1, 2, 0).numpy())

    def encode(self, pixels: Pixels, grid: Tensor | None = None) -> VisionStates:
        """Run CLIP; a reduced raster resizes the picture and interpolates the position table."""
        tower = self.model.model.vision_tower
        values = pixels.tensors["pixel_values"].to(self.device, self.dtype)
        rasters = pixels.grid
        if grid is not None:
            patch = self.model.config.vision_config.patch_size
            size = (grid[0] * patch).tolist()  # every picture has the same raster
            values = F.interpolate(values, size, mode="bicubic", antialias=True)
            rasters = grid
        out = tower(values, output_hidden_states=True, interpolate_pos_encoding=grid is not None)
        states = out.hidden_states
        chosen = self.model.config.vision_feature_layer
        layer_numbers = [chosen] if isinstance(chosen, int) else list(chosen)
        features = torch.cat([states[number] for number in layer_numbers], -1)
        # `hidden_states[k]` is the output of layer k - 1, so its last layer's input is one before.
        index = layer_numbers[-1] % len(states) - 1
        layer = tower.encoder.layers[index]
        normed = layer.layer_norm1(states[index])
        attention = layer.self_attn

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

        def attention_rows(rows: Tensor) -> Tensor:
            query = heads(attention.q_proj(normed[:, rows])) * attention.scale
            key = heads(attention.k_proj(normed))
            weights = (query @ key.transpose(-1, -2)).float().softmax(-1)
            return weights.to(normed.dtype)

        def attention_keys() -> Tensor:
            return heads(attention.k_proj(normed)).mean(1)

        return VisionStates(
            features,
            rasters.to(self.device),
            pixels.keys,
            True,
            attention_rows,
            attention_keys,
            layer_features=lambda layer: states[layer],
            pixels=values,
            project=self._projected,
        )

    def project(self, vision: VisionStates, selection: Selection | None) -> Visual:
        """Project the patches (and CLS, if selected) with the two-layer MLP."""
        tower_tokens = vision.features.shape[1]
        place = torch.arange(-1, tower_tokens - 1, device=self.device)
        place[0] = tower_tokens - 1  # CLS: one past the raster
        place = place.expand(len(vision.features), -1)
        if selection is not None:
            features = selection.apply(vision.features)
            place = selection.gather(place, -1)
        elif self.model.config.vision_feature_select_strategy == "full":
            features = vision.features
        else:
            features, place = vision.features[:, 1:], place[:, 1:]
        return Visual(self._projected(features), place, vision.grid)

    def _projected(self, features: Tensor) -> Tensor:
        embeds: Tensor = self.model.model.multi_modal_projector(features)
        return embeds.to(self.dtype)

    # Text -------------------------------------------------------------------------------------

    def prompt(self, question: str, pictures: int, layout: PromptLayout = "standard") -> Prompt:
        """Wrap a question in Vicuna v1 (spec tasks 2) or VoCo's image-first order of it."""
        if layout == "image_first" and pictures:
            return self._image_first(question, pictures)
        if layout == "marker_first":
            raise UsageError(f"{self.spec.name} knows no {layout!r} prompt; use prompt=standard")
        image_lines = f"{self.processor.image_token}\n" * pictures
        if self.options["template"] == "chat":
            content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
            message = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(message, add_generation_prompt=True)
        else:
            text = f"{SYSTEM} USER: {image_lines}{question} ASSISTANT:"
        return Prompt.split(self._ids(text), self.model.config.image_token_id, pictures)

    def continuation(self, question: str, layout: PromptLayout = "standard") -> tuple[int, ...]:
        """Open the next turn of Vicuna v1's template, or of the processor's own."""
        if layout == "image_first":
            question = question.replace("\n", "")
        elif self.options["template"] == "chat":
            return super().continuation(question, layout)
        return self._ids(f"USER: {question} ASSISTANT:", special=False)

    def _image_first(self, question: str, pictures: int) -> Prompt:
        """Order the prompt as BOS, picture, newline, learned tokens, newline, system, question."""
        tokenizer = self.processor.tokenizer
        newline = self._ids("\n", special=False)
        text = f"{SYSTEM_OF_THE_IMAGE} USER: {question} ASSISTANT:"
        text = text.replace(self.processor.image_token, "").replace("\n", "")
        bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
        return Prompt(
            chunks=(bos,) + ((),) * (pictures - 1),
            bridge=newline,
            after=newline + self._ids(text, special=False),
        )

    def _ids(self, text: str, special: bool = True) -> tuple[int, ...]:
        return tuple(self.processor.tokenizer(text, add_special_tokens=special)["input_ids"])

    # Decoder ----------------------------------------------------------------------------------

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.model.model.language_model.layers

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine for the one position plane."""
        return self.model.model.language_model.rotary_emb(hidden, position_ids=positions[0])

    def queries(self, layer: int | nn.Module, normed: Tensor, rotary: Any) -> Tensor:
        """Post-rotary queries of one layer."""
        return self._rotated(layer, "q_proj", normed, rotary)

    def keys(self, layer: int | nn.Module, normed: Tensor, rotary: Any) -> Tensor:
        """Post-rotary keys of one layer."""
        return self._rotated(layer, "k_proj", normed, rotary)

    def _rotated(self, layer: int | nn.Module, name: str, normed: Tensor, rotary: Any) -> Tensor:
        attention = self.block(layer).self_attn
        heads = getattr(attention, name)(normed).unflatten(-1, (-1, attention.head_dim))
        cosine, sine = (table.unsqueeze(2) for table in rotary)
        rotated: Tensor = heads * cosine + rotate_half(heads) * sine
        return rotated.transpose(1, 2)

    def norm(self, hidden: Tensor) -> Tensor:
        """Apply the final norm of the decoder."""
        return self.model.model.language_model.norm(hidden)


def _pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Centre a picture on a square of the mean colour (rounded down, spec abstractive 0.5)."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


BACKBONE = LlavaBackbone
