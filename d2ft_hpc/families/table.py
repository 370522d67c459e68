"""The families that there are."""

from __future__ import annotations

from torch import nn

from d2ft_hpc.errors import UnsupportedModelError
from d2ft_hpc.families.family import BlockFamily
from d2ft_hpc.families.timm_encoders import TimmEncoder
from d2ft_hpc.families.timm_eva import TimmEva
from d2ft_hpc.families.timm_naflex import TimmNaFlex
from d2ft_hpc.families.timm_relative import TimmRelative
from d2ft_hpc.families.timm_vit import TimmVit
from d2ft_hpc.families.transformers_decoder import TransformersDecoder
from d2ft_hpc.families.transformers_vision import (
    TransformersClip,
    TransformersDino,
    TransformersDinov3,
    TransformersSiglip,
    TransformersVit,
)

FAMILIES: tuple[BlockFamily, ...] = (
    TimmVit(),
    TimmEva(),
    TimmRelative(),
    TimmNaFlex(),
    TimmEncoder(),
    TransformersVit(),
    TransformersDino(),
    TransformersDinov3(),
    TransformersClip(),
    TransformersSiglip(),
    TransformersDecoder(),
)


def find_family(model: nn.Module) -> BlockFamily | None:
    """None if no family knows the model's class."""
    return next((family for family in FAMILIES if family.has(model)), None)


def family_of(model: nn.Module) -> BlockFamily:
    """Raises UnsupportedModelError if no family knows the model's class."""
    family = find_family(model)
    if family is None:
        inside = find_backbone(model)
        if inside is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has a {type(inside).__name__} inside, which follows plans in own loops "
                f"(d2ft_hpc.attach), not here"
            )
        module = type(model).__module__
        told = f"{module}.{type(model).__name__} is none of the supported models"
        if module.startswith("timm."):
            raise UnsupportedModelError(
                f"{told}; d2ft-hpc models lists those of timm, and says why others are not"
            )
        raise UnsupportedModelError(f"{told}, which are {supported()}; d2ft-hpc models lists timm's by name")
    return family


def find_backbone(model: nn.Module) -> nn.Module | None:
    """The first model of a known family that `model` is or has inside; None if there is none."""
    return next((module for module in model.modules() if find_family(module) is not None), None)


def backbone_of(model: nn.Module) -> nn.Module:
    """The model of a known family that `model` is or has inside, such as in peft's wrapper or under a head of its own.

    Raises UnsupportedModelError where there is none, or more than one.
    """
    found = [module for module in model.modules() if find_family(module) is not None]
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(found)} supported models inside ({type(found[0]).__name__}, ...): "
            f"give the one that is to follow plans"
        )
    if not found:
        family_of(model)  # or it is refused
    return found[0]


def supported() -> str:
    """All that fits, in words."""
    return ", ".join(dict.fromkeys(family.supported for family in FAMILIES))
