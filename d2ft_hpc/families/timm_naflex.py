"""timm's NaFlexVit: its own embeddings, blocks of ViT or Eva; images as they are or cut into patches before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from d2ft_hpc.families.family import AnySize
from d2ft_hpc.families.timm_attention import Positions
from d2ft_hpc.families.timm_blocks import TimmBlocks
from d2ft_hpc.families.timm_models import class_of_timm

NaFlexVit = class_of_timm("models.naflexvit", "NaFlexVit")


class TimmNaFlex(AnySize, TimmBlocks):
    supported = "timm's NaFlexVit"
    names_below = ("embeds", "rope", "norm_pre")
    refuses_parts = "timm's NaFlexVit gives blocks masks and positions, which parts of it would not get"

    def has(self, model: nn.Module) -> bool:
        return NaFlexVit is not None and isinstance(model, NaFlexVit)

    def below(self, model: Any, images: Tensor) -> tuple[Tensor, Any]:
        embedded = model._forward_embeds(images, None, None, None)
        return embedded["patches"], (embedded["rope_embeds"], model.rope_is_mixed)

    def goes_beside(self, name: str) -> bool:
        return name.startswith("rope.")

    def arguments(self, beside: Any, index: int) -> Mapping[str, Any]:
        rope, is_by_depth = beside
        if rope is None:
            return {}
        return {"rope": rope[index] if is_by_depth else rope}

    def positions(
        self, *, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Positions:
        return Positions(rope, attn_mask, is_causal)

    def tokens_between(self, model: Any) -> int | None:
        return None

    def image_shape(self, model: Any) -> tuple[int, int, int] | None:
        embed = model.embeds
        high, wide = embed.patch_size
        down, across = embed.pos_embed_grid_size
        height, width = embed.default_img_size or (down * high, across * wide)
        return int(embed.in_chans), int(height), int(width)

    def takes_other_sizes(self, model: Any) -> bool:
        return True

    def patch_size(self, model: Any) -> tuple[int, int]:
        high, wide = model.embeds.patch_size
        return int(high), int(wide)

    def embedding(self, model: Any) -> nn.Module | None:
        embed: nn.Module | None = model._modules.get("embeds")
        return embed
