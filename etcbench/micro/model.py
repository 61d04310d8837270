"""micro-llava."""

from __future__ import annotations

import numpy as np
import torch
from transformers import CLIPVisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

IMAGE = 64
PATCH = 8


def vision_config() -> CLIPVisionConfig:
    """CLIP ViT, 160 wide, 6 layers: 64 patch tokens and CLS; 1.6 M parameters."""
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
