"""The families that there are."""

from __future__ import annotations

from torch import nn

from d2ft_hpc.errors import UnsupportedModelError
from d2ft_hpc.families.family import BlockFamily
from d2ft_hpc.families.timm_eva import TimmEva
from d2ft_hpc.families.timm_vit import TimmVit

FAMILIES: tuple[BlockFamily, ...] = (TimmVit(), TimmEva())


def find_family(model: nn.Module) -> BlockFamily | None:
    """None if no family knows the model's class."""
    return next((family for family in FAMILIES if family.has(model)), None)


def family_of(model: nn.Module) -> BlockFamily:
    """Raises UnsupportedModelError if no family knows the model's class."""
    family = find_family(model)
    if family is None:
        raise UnsupportedModelError(f"{type(model).__name__} is none of the supported models: {supported()}.")
    return family


def supported() -> str:
    """All that fits, in words."""
    return "; ".join(family.supported for family in FAMILIES)
