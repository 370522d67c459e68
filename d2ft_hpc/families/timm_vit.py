"""timm's VisionTransformer: ViT, DeiT, CLIP, SigLIP, DINOv2, AIMv2, BEiT-3, TIPS, ViTamin, hybrids."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from d2ft_hpc.families.timm_attention import Positions
from d2ft_hpc.families.timm_blocks import TimmBlocks
from d2ft_hpc.families.timm_models import patches


class TimmVit(TimmBlocks):
    supported = "timm's VisionTransformer"
    names_below = ("patch_embed", "pos_embed", "cls_token", "dist_token", "reg_token", "norm_pre")
    """The distilled DeiTs have a token of their own."""

    def has(self, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    def below(self, model: Any, images: Tensor) -> tuple[Tensor, Any]:
        return model.norm_pre(model.patch_drop(model._pos_embed(patches(model.patch_embed, images)))), None

    def positions(self, attn_mask: Tensor | None = None, is_causal: bool = False) -> Positions:
        return Positions(mask=attn_mask, is_causal=is_causal)
