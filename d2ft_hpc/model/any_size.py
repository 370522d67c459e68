"""Forward passes at other resolutions than the model was made for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.layers import Format
from timm.models.vision_transformer import VisionTransformer
from torch import nn


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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the mode is as before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
