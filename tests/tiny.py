"""Tiny random models with real processors: every part of the path, in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from etcbench.backbones import Backbone, load_backbone
from etcbench.backbones.llava import LlavaBackbone

SPECIAL = ["<s>", "</s>", "<pad>", "<image>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def llava_config(
    side: int = 24, patch: int = 4, layers: int = 4, kv_heads: int = 2, **text: int
) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch,
        projection_dim=32,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, **text}
    llama = LlamaConfig(
        vocab_size=260,
        num_hidden_layers=layers,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **sizes,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=llama,
        image_token_index=3,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(side // patch) ** 2,
    )


def save_tiny_llava(path: Path, seed: int = 0, **shape: int) -> Path:
    """Write an ordinary model directory with random weights."""
    torch.manual_seed(seed)
    config = llava_config(**shape)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # wide enough that attention and answers depend on the input
            if weight.dim() > 1:
                weight.normal_(0, 0.3 if "embed" in name else 0.25)
    model.generation_config.bos_token_id = 0
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 2
    model.save_pretrained(path)
    side = config.vision_config.image_size
    image = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    LlavaProcessor(
        image_processor=image,
        tokenizer=byte_tokenizer(),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(path)
    return path


def tiny_llava(path: Path, seed: int = 0, attention: str = "sdpa", **shape: int) -> LlavaBackbone:
    """Save and load a tiny model (fp32, CPU)."""
    if not (path / "config.json").exists():
        save_tiny_llava(path, seed, **shape)
    backbone: Backbone = load_backbone(str(path), device="cpu", attention=attention)
    assert isinstance(backbone, LlavaBackbone)
    return backbone


def picture(seed: int = 0, size: tuple[int, int] = (24, 24)) -> Image.Image:
    """A random RGB picture."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
