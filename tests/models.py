"""Tiny models that tests share."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from d2ft_hpc.lifecycle import PlanContext, PlanCosts
from d2ft_hpc.metering import StepCosts
from d2ft_hpc.parallel.rank_layout import Placement
from d2ft_hpc.plan_config import PlanConfig

DEPTH, HEADS, CLASSES = 4, 3, 10
Model = TypeVar("Model", bound=nn.Module)


def tiny_vit(seed: int = 0, **options: Any) -> VisionTransformer:
    """A ViT of 4 blocks of 3 heads, width 48, 17 tokens, with biases and norms away from their initial values."""
    return tiny(VisionTransformer, 0.05, seed, **{"num_classes": CLASSES, **options})


def tiny(kind: type[Model], noise: float, seed: int = 0, **options: Any) -> Model:
    """noise: of the normal numbers that are added to every parameter."""
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": DEPTH, "num_heads": HEADS}
    try:
        model = kind(**{**sizes, **options})
    except TypeError as error:
        pytest.skip(f"this timm's {kind.__name__} lacks an option: {error}")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model


def random_batch(seed: int, samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, 16, 16, generator=generator)
    return images, torch.randint(0, CLASSES, (samples,), generator=generator)


def context_of(settings: PlanConfig, costs: StepCosts, *, slots: int, ranks: int = 1) -> PlanContext:
    """Of `ranks` replicas that hold the whole model."""
    blocks, heads = len(costs.subnets), int(costs.subnets[0])
    return PlanContext(
        settings,
        Placement.whole(ranks, 0, blocks, heads),
        costs,
        PlanCosts.counted(costs, None, ranks),
        slots=slots,
        micro_batch_size=8,
    )
