"""EVA-ViT-G, the vision tower of LLaMA-VID, in plain torch (spec abstractive 4.1).

Patches of 14 pixels, 39 blocks of width 1408, biases on queries and values only, learned absolute
positions, no norm behind the last block. Names of the parameters are those of transformers'
`InstructBlipVisionModel`, which is the same tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etcbench.costs import matrix_macs
from etcbench.released import KeyMap

PATCH = 14
EPS = 1e-6


@dataclass(frozen=True)
class EvaShape:
    """Width, blocks, attention heads, MLP width, and side of its own pictures in patches."""

    width: int = 1408
    depth: int = 39
    heads: int = 16
    inner: int = 6144
    side: int = 16


GIANT = EvaShape()


class EvaTower(nn.Module):
    """Pictures to features with a CLS token in front."""

    def __init__(self, shape: EvaShape) -> None:
        super().__init__()
        self.embeddings = Embeddings(shape.width, shape.side)
        blocks = [Block(shape.width, shape.heads, shape.inner) for _ in range(shape.depth)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pictures, shape (pictures, 3, height, width).

        Returns
        -------
        Tensor
            Output of the last block, shape (pictures, 1 + patches, width).
        """
        hidden = self.embeddings(pixels)
        layers: Any = self.encoder["layers"]
        for layer in layers:
            hidden = layer(hidden)
        return hidden

    def macs(self, patches: int) -> int:
        """Count the multiply-accumulates of a picture of so many patches."""
        tokens, blocks = patches + 1, cast(nn.ModuleList, self.encoder["layers"])
        width = self.embeddings.patch_embedding.out_channels
        embedded = matrix_macs(self.embeddings.patch_embedding, patches)
        return embedded + matrix_macs(blocks, tokens) + len(blocks) * 2 * tokens**2 * width


class Embeddings(nn.Module):
    """CLS and patches, with positions for a square of ``side`` patches."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + side * side, width) * 0.02)
        self.patch_embedding = nn.Conv2d(3, width, PATCH, stride=PATCH)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed; the position table is resized (bicubic) for pictures of another size."""
        patches = self.patch_embedding(pixels)
        first = self.class_embedding.expand(len(pixels), -1, -1)
        hidden = torch.cat([first, patches.flatten(2).transpose(1, 2)], 1)
        table: Tensor = self.position_embedding
        raster = tuple(patches.shape[-2:])
        side = round((table.shape[1] - 1) ** 0.5)
        if raster != (side, side):
            grid = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, raster, mode="bicubic", align_corners=False)
            table = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table)], 1)
        return hidden + table


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.self_attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "projection": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, hidden: Tensor) -> Tensor:
        """Run the block."""
        packed = self.self_attn["qkv"](self.layer_norm1(hidden))
        query, key, value = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden = hidden + self.self_attn["projection"](mixed)
        inner = F.gelu(self.mlp["fc1"](self.layer_norm2(hidden)))
        return hidden + self.mlp["fc2"](inner)


def joined_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join LAVIS's biases of queries and values to one, with zeros for the keys."""
    joined = dict(state)
    for key in state:
        block = key.removesuffix("q_bias")
        if block != key and f"{block}v_bias" in state:
            query, value = joined.pop(key), joined.pop(f"{block}v_bias")
            joined[f"{block}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return joined


# LAVIS's ``eva_vit_g.pth``, which has one block more than is used.
EVA_KEYS = KeyMap(
    {
        f"blocks.{GIANT.depth}.*": None,
        "norm.*": None,
        "fc_norm.*": None,
        "head.*": None,
        "cls_token": "compressor.eva.embeddings.class_embedding",
        "pos_embed": "compressor.eva.embeddings.position_embedding",
        "patch_embed.proj.*": "compressor.eva.embeddings.patch_embedding.*",
        "blocks.*.attn.qkv.*": "compressor.eva.encoder.layers.*.self_attn.qkv.*",
        "blocks.*.attn.proj.*": "compressor.eva.encoder.layers.*.self_attn.projection.*",
        "blocks.*.norm1.*": "compressor.eva.encoder.layers.*.layer_norm1.*",
        "blocks.*.norm2.*": "compressor.eva.encoder.layers.*.layer_norm2.*",
        "blocks.*.mlp.*": "compressor.eva.encoder.layers.*.mlp.*",
        # transformers' InstructBLIP, whose tower is the same
        "vision_model.post_layernorm.*": None,
        "vision_model.*": "compressor.eva.*",
        "language_model.*": None,
        "language_projection.*": None,
        "qformer.*": None,
        "query_tokens": None,
    },
    before=joined_biases,
)
