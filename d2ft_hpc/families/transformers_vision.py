"""transformers' vision models: ViT, DINOv2 with and without registers, DINOv3, and the towers of CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from d2ft_hpc.errors import UnsupportedModelError
from d2ft_hpc.families.family import Drops
from d2ft_hpc.families.transformers_models import TransformersFamily


class TransformersVision(TransformersFamily):
    """The model itself resamples positions for images of other sizes."""

    names_sized = ("embeddings",)
    prefix_tokens = 1
    """Number of an image's tokens beside its patches and registers."""
    interpolates_on_demand = True
    """The module `embeddings` resamples positions only where it is told to; False: wherever necessary."""

    def tokens(self, model: Any, height: int, width: int) -> int:
        high, wide = self.patch_size(model)
        registers = getattr(model.config, "num_register_tokens", 0)
        return int(height // high * (width // wide) + self.prefix_tokens + registers)

    def image_shape(self, model: Any) -> tuple[int, int, int] | None:
        return int(model.config.num_channels), *_pair(model.config.image_size)

    def takes_other_sizes(self, model: Any) -> bool:
        return not self.interpolates_on_demand

    def patch_size(self, model: Any) -> tuple[int, int]:
        return _pair(model.config.patch_size)

    def embedding(self, model: Any) -> nn.Module | None:
        embeds: nn.Module = model  # the whole model, since rotary positions also depend on the images
        return embeds

    def take_any_size(self, model: Any) -> None:
        down, across = _pair(model.config.image_size)
        if down != across and hasattr(model.embeddings, "interpolate_pos_encoding"):
            raise UnsupportedModelError(
                f"transformers resamples positions of square images alone, and this {type(model).__name__} is for "
                f"{down} x {across} pixels: use a planner that leaves images as they are"
            )
        if self.interpolates_on_demand:
            vars(model.embeddings)["forward"] = partial(_interpolating, model.embeddings)


def _interpolating(embeddings: Any, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kwargs["interpolate_pos_encoding"] = True
    embedded: Tensor = type(embeddings).forward(embeddings, pixel_values, *args, **kwargs)
    return embedded


def _pair(size: Any) -> tuple[int, int]:
    down, across = size if isinstance(size, Iterable) else (size, size)
    return int(down), int(across)


class TransformersVit(TransformersVision):
    supported = "transformers' ViT"
    classes = ("vit.modeling_vit.ViTModel",)
    blocks_path = "layers"
    attention = "attention"
    norms = ("layernorm_before", "layernorm_after")
    names_below = ("embeddings",)

    def end(self, block: Any, index: int, branch: Tensor) -> Tensor:
        dropped: Tensor = block.dropout(branch)
        return dropped

    def drops(self, block: Any) -> Drops:
        return Drops({}, (block.dropout,), ())


class TransformersDino(TransformersVision):
    """DINOv3 has rotary positions, drawn anew for each micro-batch in training where its configuration says so."""

    supported = "DINOv2, DINOv3"
    classes: tuple[str, ...] = (
        "dinov2.modeling_dinov2.Dinov2Model",
        "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",
    )
    blocks_path = "encoder.layer"
    attention = "attention"
    norms = ("norm1", "norm2")
    names_below = ("embeddings",)
    interpolates_on_demand = False

    def end(self, block: Any, index: int, branch: Tensor) -> Tensor:
        scale = block.layer_scale2 if index else block.layer_scale1
        ended: Tensor = block.drop_path(scale(branch))
        return ended

    def drops(self, block: Any) -> Drops:
        return Drops({}, (), (block.drop_path,))


class TransformersDinov3(TransformersDino):
    classes = ("dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel",)
    blocks_path = "model.layer"


class TransformersClip(TransformersVision):
    supported = "vision towers of CLIP and SigLIP"
    classes = ("clip.modeling_clip.CLIPVisionModel",)
    blocks_path = "encoder.layers"
    attention = "self_attn"
    norms = ("layer_norm1", "layer_norm2")
    names_below = ("embeddings", "pre_layrnorm")


class TransformersSiglip(TransformersClip):
    classes = ("siglip.modeling_siglip.SiglipVisionModel",)
    prefix_tokens = 0
