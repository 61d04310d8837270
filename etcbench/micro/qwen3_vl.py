"""micro-qwen3vl: a Qwen3-VL of 3.4 million parameters in ordinary transformers format.

Pictures keep their size: patches of 4 pixels, 2 x 2 of them a token, so that a scene of 64 x 64
pixels gives 64 tokens and one of 64 x 96 gives 96. Two tapped tower layers feed the first two
decoder layers (DeepStack), positions have three interleaved axes, and two query heads share a key
head. The language model is as thin and deep as micro-llava's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from etcbench.micro.tokenizer import (
    IMAGE_PAD,
    QWEN_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    build_qwen_tokenizer,
)

PATCH = 4
MERGE = 2
TOKEN = PATCH * MERGE  # pixels on a side of one visual token
AREAS = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}  # areas, in spite of their names
SIDE = 16  # patches on a side for which the tower has learned positions; others are interpolated
# The family's turn markers; a picture stands between its two markers, in front of the text.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{{- '<|im_start|>assistant\n' if add_generation_prompt else '' -}}"
)


@cache
def build_processor() -> Qwen3VLProcessor:
    """Build the processor: pictures in their own size, the tokenizer, Qwen3-VL's prompt."""
    half = [0.5, 0.5, 0.5]
    steps: dict[str, Any] = {
        "size": AREAS,
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": half,
        "image_std": half,
    }
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**steps),
        tokenizer=build_qwen_tokenizer(),
        video_processor=Qwen3VLVideoProcessor(**steps),
        chat_template=CHAT_TEMPLATE,
    )


def config() -> Qwen3VLConfig:
    """Configure tower and language model."""
    tokenizer = build_processor().tokenizer
    token = tokenizer.convert_tokens_to_ids
    vision = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "depth": 5,
        "num_heads": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": 128,
        "num_position_embeddings": SIDE**2,
        "deepstack_visual_indexes": [1, 3],
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        # The usual base suits thousands of positions; a sequence here has some two hundred.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return Qwen3VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=token(IMAGE_PAD),
        video_token_id=token(VIDEO_PAD),
        vision_start_token_id=token(VISION_START),
        vision_end_token_id=token(VISION_END),
        tie_word_embeddings=True,
    )


def build_micro_qwen3vl(seed: int) -> Qwen3VLForConditionalGeneration:
    """Build an untrained micro-qwen3vl, float32; the caller's random state is left alone."""
    tokenizer = build_processor().tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config())
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(QWEN_PAD)],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model
