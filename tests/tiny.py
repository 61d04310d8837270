"""Tiny random models with real processors: every part of the path, in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from etcbench.backbones import Backbone, load_backbone
from etcbench.backbones.llava import LlavaBackbone
from etcbench.backbones.llava_next import LlavaNextBackbone
from etcbench.backbones.qwen3_vl import Qwen3VLBackbone
from etcbench.backbones.stream import Pixels

SPECIAL = ["<s>", "</s>", "<pad>", "<image>"]
QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# The model family's turn markers; a picture stands between its two markers, in front of the text.
QWEN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{{- '<|im_start|>assistant\n' if add_generation_prompt else '' -}}"
)


def byte_level(special: list[str]) -> Tokenizer:
    """One token per byte, behind the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """LLaVA's kind: BOS in front."""
    tokenizer = byte_level(SPECIAL)
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
    _randomise(model)
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


def save_tiny_llava_next(path: Path, seed: int = 0) -> Path:
    """Write a model directory: tiles of 12x12 pixels, 3x3 tokens each, at most four and a whole."""
    torch.manual_seed(seed)
    plain = llava_config(side=12)
    pinpoints = [[24, 24], [12, 24], [24, 12], [12, 36]]
    config = LlavaNextConfig(
        vision_config=plain.vision_config,
        text_config=plain.text_config,
        image_token_index=3,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaNextForConditionalGeneration(config)
    _randomise(model)
    model.generation_config.bos_token_id = 0
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 2
    model.save_pretrained(path)
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 12},
            crop_size={"height": 12, "width": 12},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer=byte_tokenizer(),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(path)
    return path


def tiny_llava_next(path: Path, seed: int = 0, attention: str = "sdpa") -> LlavaNextBackbone:
    """Save and load a tiny model (fp32, CPU)."""
    if not (path / "config.json").exists():
        save_tiny_llava_next(path, seed)
    backbone: Backbone = load_backbone(str(path), device="cpu", attention=attention)
    assert isinstance(backbone, LlavaNextBackbone)
    return backbone


def qwen3_vl_config(layers: int = 4, kv_heads: int = 2, **text: int) -> Qwen3VLConfig:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 4,
        "num_heads": 2,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, **text}
    return Qwen3VLConfig(
        vision_config=vision,
        text_config={
            "vocab_size": 263,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
            },
            **sizes,
        },
        image_token_id=QWEN_SPECIAL.index("<|image_pad|>"),
        video_token_id=QWEN_SPECIAL.index("<|video_pad|>"),
        vision_start_token_id=QWEN_SPECIAL.index("<|vision_start|>"),
        vision_end_token_id=QWEN_SPECIAL.index("<|vision_end|>"),
    )


def save_tiny_qwen3_vl(path: Path, seed: int = 0, **shape: int) -> Path:
    """Write an ordinary model directory with random weights: a visual token per 4x4 pixels."""
    torch.manual_seed(seed)
    config = qwen3_vl_config(**shape)
    model = Qwen3VLForConditionalGeneration(config)
    _randomise(model)
    model.generation_config.eos_token_id = [2, 0]
    model.generation_config.pad_token_id = 0
    model.save_pretrained(path)
    vision = config.vision_config
    cut = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    size = {"shortest_edge": 64, "longest_edge": 4096}  # areas, in spite of their names
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(QWEN_SPECIAL), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_SPECIAL[1:]})
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **cut),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=size, **cut),
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(path)
    return path


def tiny_qwen3_vl(
    path: Path, seed: int = 0, attention: str = "sdpa", **shape: int
) -> Qwen3VLBackbone:
    """Save and load a tiny model (fp32, CPU)."""
    if not (path / "config.json").exists():
        save_tiny_qwen3_vl(path, seed, **shape)
    backbone: Backbone = load_backbone(str(path), device="cpu", attention=attention)
    assert isinstance(backbone, Qwen3VLBackbone)
    return backbone


def _randomise(model: torch.nn.Module) -> None:
    """Draw weights wide enough that attention and answers depend on the input."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3 if "embed" in name else 0.25)


def picture(seed: int = 0, size: tuple[int, int] = (24, 24)) -> Image.Image:
    """A random RGB picture."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def reference_inputs(backbone: Backbone, question: str, seed: int | None) -> dict[str, Tensor]:
    """The inputs that the untouched model takes for a question, on the picture of a seed."""
    if seed is None:
        return untouched_inputs(backbone, question, None)
    return untouched_inputs(backbone, question, backbone.preprocess([picture(seed)], ["x"]))


def untouched_inputs(backbone: Backbone, question: str, pixels: Pixels | None) -> dict[str, Tensor]:
    """The inputs that the untouched model takes for a question on a picture."""
    sizes = [] if pixels is None else pixels.grid.prod(-1).tolist()
    prompt = backbone.prompt(question, len(sizes))
    image_token = backbone.model.config.image_token_id
    ids: list[int] = []
    for chunk, size in zip(prompt.chunks, sizes, strict=True):
        ids += [*chunk, *[image_token] * size]
    tokens = torch.tensor([[*ids, *prompt.after]])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if pixels is not None:
        inputs |= pixels.tensors
        if backbone.planes > 1:
            inputs["mm_token_type_ids"] = (tokens == image_token).int()
    return inputs
