"""Forward passes at other resolutions than the model was made for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.layers import Format
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from d2ft_hpc.errors import ConfigError


def of_any_size(model: VisionTransformer) -> VisionTransformer:
    """The same model, its modules and parameters shared, with position embeddings resampled to any image size.

    What timm builds for dynamic_img_size=True, made from a model, or the part of one, that was not built so.
    """
    twin: VisionTransformer = copy.copy(model)
    twin._modules = dict(model._modules)
    if "patch_embed" in twin._modules:  # only the first part of a model has it
        twin.patch_embed = copy.copy(model.patch_embed)
        twin.patch_embed.strict_img_size = False
        twin.patch_embed.flatten = False
        twin.patch_embed.output_fmt = Format.NHWC
    twin.dynamic_img_size = True
    return twin


@contextmanager
def taking_any_size(model: VisionTransformer) -> Iterator[None]:
    """Inside, the model itself is what `of_any_size` makes of it: for one whose hooks belong to it, as FSDP2's do."""
    changed = {
        model: {"dynamic_img_size": True},
        model.patch_embed: {"strict_img_size": False, "flatten": False, "output_fmt": Format.NHWC},
    }
    before = {module: {name: getattr(module, name) for name in names} for module, names in changed.items()}
    try:
        for module, values in changed.items():
            vars(module).update(values)
        yield
    finally:
        for module, values in before.items():
            vars(module).update(values)


def image_shape_of(model: VisionTransformer) -> tuple[int, int, int]:
    """(channel, height, width) that the model was made for. Raises ConfigError where it does not say."""
    projection, size = model.patch_embed.proj, model.patch_embed.img_size
    if size is None:
        raise ConfigError("the model has no image size: make it with img_size=, so that costs can be counted")
    return int(projection.in_channels), int(size[0]), int(size[1])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the mode is as before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
