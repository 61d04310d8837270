"""micro-llava: a LLaVA of 3.5 million parameters in ordinary transformers format.

A CLIP ViT (64 patch tokens and CLS, feature layer -2), the two-layer projector and a Llama. Eight
thin layers rather than four wide ones, so that methods which drop tokens between layers have room.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from etcbench.errors import UsageError
from etcbench.micro.untrained import save

IMAGE = 64
PATCH = 8
# LLaVA's "vicuna_v1" (spec tasks 2): system sentence, " USER: ", picture line, question, and
# " ASSISTANT:". BOS is the tokenizer's business.
CHAT_TEMPLATE = (
    "{%- if messages[0].role == 'system' -%}"
    "{%- set system = messages[0].content if messages[0].content is string "
    "else messages[0].content[0].text -%}"
    "{%- set turns = messages[1:] -%}"
    "{%- else -%}"
    "{%- set system = SYSTEM_SENTENCE -%}{%- set turns = messages -%}"
    "{%- endif -%}"
    "{{- system + ' ' -}}"
    "{%- for message in turns -%}"
    "{{- 'USER: ' if message.role == 'user' else ' ASSISTANT: ' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}"
    "{%- for part in message.content if part.type == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}"
    "{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- '</s>' if message.role == 'assistant' else '' -}}"
    "{%- endfor -%}"
    "{{- ' ASSISTANT:' if add_generation_prompt else '' -}}"
)


def vision_config() -> CLIPVisionConfig:
    """Configure the ViT: 160 wide, 6 layers, 64 patch tokens and CLS; 1.6 M parameters."""
    return CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=6,
        num_attention_heads=5,
        image_size=IMAGE,
        patch_size=PATCH,
        projection_dim=160,
    )


def normalise(picture: np.ndarray) -> torch.Tensor:
    """Turn uint8 [H, W, 3] into float32 [3, H, W], as the processor does for a 64-pixel picture."""
    mean = torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    return (torch.from_numpy(picture.copy()).permute(2, 0, 1) / 255 - mean) / std


@cache
def build_processor() -> LlavaProcessor:
    """Build the processor: CLIP's picture steps at 64 pixels, the tokenizer, LLaVA's prompt."""
    from etcbench.micro.tokenizer import IMAGE as IMAGE_TOKEN
    from etcbench.micro.tokenizer import SYSTEM, build_tokenizer

    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}
        ),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE.replace("SYSTEM_SENTENCE", repr(SYSTEM)),
    )


def build_micro_llava(
    seed: int, vision_weights: str | Path | None = None
) -> LlavaForConditionalGeneration:
    """Build an untrained micro-llava, float32.

    Parameters
    ----------
    seed : int
        Seed of the weights; the caller's random state is left alone.
    vision_weights : str or pathlib.Path, optional
        ``vision.safetensors`` of the warm-up (`etcbench.micro.warmup`).

    Raises
    ------
    UsageError
        If the weights are of another tower.
    """
    tokenizer = build_processor().tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
    if vision_weights is not None:
        _load_vision(model, Path(vision_weights))
    return model


def _load_vision(model: LlavaForConditionalGeneration, file: Path) -> None:
    if not file.is_file():
        raise UsageError(f"no {file}; make it with python -m etcbench.micro.warmup")
    tower = model.model.vision_tower
    # The warm-up stops at the layer LLaVA reads, so the last layer and norm stay as they are.
    result = tower.load_state_dict(load_file(file), strict=False)
    last = f"layers.{tower.config.num_hidden_layers - 1}."
    missing = [key for key in result.missing_keys if last not in key]
    if missing or result.unexpected_keys:
        raise UsageError(
            f"{file} is not a warmed-up micro tower: {missing or result.unexpected_keys}"
        )


def save_micro_llava(model: LlavaForConditionalGeneration, folder: str | Path) -> None:
    """Save model and processor; weights in half precision, to be loaded as float32."""
    save(model, build_processor(), folder)
