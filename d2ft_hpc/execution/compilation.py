"""When torch.compile may make kernels, and those of what a model computes below and above its blocks: a dozen that wait
for memory, by themselves as long as a block's own in a small model."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from d2ft_hpc.execution.copies import leave_out_of_copies


def cannot_compile() -> bool:
    """Within a compilation, or a mode that counts operators: it sees none in a compiled function, and keeps a function
    that would be compiled then from being compiled for good."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def allow_kernels_of(micro_batches: int) -> None:
    """Lets torch.compile of a whole model, which is the user's own, make kernels for so many more micro-batches.

    Each runs other heads, for which a compiled model is traced anew; at its limit of 8 torch would go on eagerly, and
    say so in a log that nobody reads.
    """
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        # The dense model's in both modes beside them; gradients may come at one point or not.
        setattr(dynamo_config, name, getattr(dynamo_config, name) + 2 * micro_batches)


def compile_outside_blocks(model: VisionTransformer) -> None:
    """Lets the model compute its embeddings and its classifier through torch.compile in training.

    Each shape is compiled for itself, the largest batch so far alone: smaller ones end an epoch. Modules with hooks
    stay eager; an engine gathers their weights.
    """
    below, above = torch.compile(_below, dynamic=False), torch.compile(_above, dynamic=False)
    largest = 0

    def forward(model: Any, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal largest
        if model.training:
            largest = max(largest, len(images))
        is_plain = model.training and not (args or kwargs or model.grad_checkpointing)
        if len(images) < largest or not is_plain or _is_hooked(model) or cannot_compile():
            result: Tensor = type(model).forward(model, images, *args, **kwargs)
            return result
        result = above(model, model.blocks(below(model, images)))
        return result

    model.forward = MethodType(forward, model)
    leave_out_of_copies(model, ["forward"])


def _is_hooked(model: VisionTransformer) -> bool:
    outside = (child for child in model.children() if child is not model.blocks)
    return any(
        part._forward_hooks or part._forward_pre_hooks for child in outside for part in child.modules()
    )


def _below(model: Any, images: Tensor) -> Tensor:
    embed = model.patch_embed
    patches = _patches(embed, images) if _is_one_product(embed, images) else embed(images)
    embedded: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(patches)))
    return embedded


def _is_one_product(embed: Any, images: Tensor) -> bool:
    """Whether patches that do not overlap are all that is embedded: as a convolution this takes four times as long."""
    if type(embed) is not PatchEmbed or type(embed.proj) is not nn.Conv2d or not embed.flatten:
        return False
    size = embed.patch_size
    return (
        (embed.proj.kernel_size, embed.proj.stride, embed.proj.padding) == (size, size, (0, 0))
        and (embed.proj.groups, embed.proj.dilation) == (1, (1, 1))
        and images.shape[-2:] == embed.img_size
        and images.shape[-2] % size[0] == images.shape[-1] % size[1] == 0
    )


def _patches(embed: PatchEmbed, images: Tensor) -> Tensor:
    """[sample, patch, channel], as the convolution of [sample, channel, height, width] gives them."""
    (samples, channels, height, width), (h, w) = images.shape, embed.patch_size
    cut = images.view(samples, channels, height // h, h, width // w, w).permute(0, 2, 4, 1, 3, 5)
    rows = cut.reshape(samples, -1, channels * h * w)
    projected = F.linear(rows, embed.proj.weight.flatten(1), embed.proj.bias)
    result: Tensor = embed.norm(projected)
    return result


def _above(model: Any, x: Tensor) -> Tensor:
    logits: Tensor = model.forward_head(model.norm(x))
    return logits
