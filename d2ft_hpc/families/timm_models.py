"""What timm's vision transformers have in common: patches below the blocks, a classifier above, blocks in between."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm.layers
import torch.nn.functional as F
from timm.layers import Format, PatchEmbed
from torch import Tensor, nn

from d2ft_hpc.families.family import BlockFamily
from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.families.low_rank import axes_of

_EMBEDS_ANY_SIZE = {"strict_img_size": False, "flatten": False, "output_fmt": Format.NHWC}
"""PatchEmbed's settings in a model of timm that was built with dynamic_img_size=True."""


class TimmFamily(BlockFamily):
    blocks_path = "blocks"
    names_sized: tuple[str, ...] = ("patch_embed",)
    attention = "attn"

    def above(self, model: Any, x: Tensor) -> Tensor:
        logits: Tensor = model.forward_head(model.norm(x))
        return logits

    def tokens(self, model: Any, height: int, width: int) -> int:
        high, wide = self.patch_size(model)
        return int(height // high * (width // wide) + model.num_prefix_tokens)

    def tokens_between(self, model: Any) -> int | None:
        drops = not is_identity(getattr(model, "patch_drop", None))
        varies = drops or getattr(model, "dynamic_img_size", False)
        return None if varies else model.patch_embed.num_patches + model.num_prefix_tokens

    def width(self, model: Any) -> int:
        return int(model.embed_dim)

    def image_shape(self, model: Any) -> tuple[int, int, int] | None:
        embed, size = model.patch_embed, model.patch_embed.img_size
        if size is None:
            return None
        projection = getattr(embed.proj, "base_layer", embed.proj)  # of peft's LoRA
        # A hybrid projects what its stem gives.
        channels = embed.in_chans if hasattr(embed, "in_chans") else projection.in_channels
        return int(channels), int(size[0]), int(size[1])

    def takes_other_sizes(self, model: Any) -> bool:
        return not model.patch_embed.strict_img_size

    def patch_size(self, model: Any) -> tuple[int, int]:
        # Of hybrids, what their stem does included.
        high, wide = model.patch_embed.feat_ratio(as_scalar=False)
        return int(high), int(wide)

    def embedding(self, model: Any) -> nn.Module | None:
        embed: nn.Module | None = model._modules.get("patch_embed")
        return embed

    def take_any_size(self, model: Any) -> None:
        """Makes it what timm builds for dynamic_img_size=True: position embeddings are resampled."""
        vars(model)["dynamic_img_size"] = True
        embedding = model._modules.get("patch_embed")  # only the first part of a model has it
        for module in (
            [] if embedding is None else embedding.modules()
        ):  # peft's wrapper has copies of timm's inside
            if "strict_img_size" in vars(module):
                vars(module).update(_EMBEDS_ANY_SIZE)

    def recomputes(self, model: Any) -> bool:
        return bool(model.grad_checkpointing)

    not_reentrant = "call timm.layers.set_reentrant_ckpt(False)"

    def recomputes_reentrantly(self, model: Any) -> bool:
        return bool(timm.layers.use_reentrant_ckpt())

    def recompute(self, model: Any) -> None:
        timm.layers.set_reentrant_ckpt(False)
        model.set_grad_checkpointing(True)

    @contextmanager
    def not_recomputing(self, model: Any) -> Iterator[None]:
        if not model.grad_checkpointing:
            yield
            return
        model.set_grad_checkpointing(False)
        try:
            yield
        finally:
            model.set_grad_checkpointing(True)

    def head_axes(self, block: Any) -> dict[str, HeadAxis]:
        return axes_of(block, self.own_axes(block), self.layers(block))

    @abstractmethod
    def own_axes(self, block: Any) -> dict[str, HeadAxis]:
        """`head_axes` without LoRA; may include parameters that the block lacks."""


def class_of_timm(module: str, name: str) -> Any:
    """A class of timm; None in older versions that lack it."""
    try:
        return getattr(importlib.import_module(f"timm.{module}"), name, None)
    except ImportError:
        return None


def is_identity(module: Any) -> bool:
    return module is None or isinstance(module, nn.Identity)


def patches(embed: Any, images: Tensor) -> Tensor:
    """What timm's module gives, [sample, patch, channel] or, in a model for any size, [sample, down, across, channel].

    On a GPU as one matrix product where patches do not overlap, since a convolution takes four times as long there.
    """
    if not (images.is_cuda and _is_one_product(embed, images)):
        embedded: Tensor = embed(images)
        return embedded
    (samples, channels, height, width), (h, w) = images.shape, embed.patch_size
    cut = images.view(samples, channels, height // h, h, width // w, w).permute(0, 2, 4, 1, 3, 5)
    rows = cut.reshape(samples, -1, channels * h * w)
    projected: Tensor = embed.norm(F.linear(rows, embed.proj.weight.flatten(1), embed.proj.bias))
    return projected if embed.flatten else projected.unflatten(1, (height // h, width // w))


def _is_one_product(embed: Any, images: Tensor) -> bool:
    if type(embed) is not PatchEmbed or type(embed.proj) is not nn.Conv2d:
        return False
    if not embed.flatten and embed.output_fmt != Format.NHWC:
        return False
    size, proj = embed.patch_size, embed.proj
    return (
        (proj.kernel_size, proj.stride, proj.padding, proj.dilation) == (size, size, (0, 0), (1, 1))
        and proj.groups == 1
        and (not embed.strict_img_size or images.shape[-2:] == embed.img_size)
        and images.shape[-2] % size[0] == images.shape[-1] % size[1] == 0
    )
