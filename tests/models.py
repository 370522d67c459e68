"""Tiny models that tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

DEPTH, HEADS, CLASSES = 4, 3, 10


def tiny_vit(seed: int = 0, **options: Any) -> VisionTransformer:
    """A ViT of 4 blocks of 3 heads, width 48, 17 tokens, with biases and norms away from their initial values."""
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": DEPTH, "num_heads": HEADS}
    try:
        model = VisionTransformer(**{**sizes, "num_classes": CLASSES, **options})
    except TypeError as error:
        pytest.skip(f"this timm's VisionTransformer lacks an option: {error}")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def random_batch(seed: int, samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, 16, 16, generator=generator)
    return images, torch.randint(0, CLASSES, (samples,), generator=generator)
