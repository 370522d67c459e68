"""timm's NaFlexVit: its own embeddings, blocks of ViT or Eva; images as they are or cut into patches before."""

from __future__ import annotations

from typing import Any

from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from d2ft_hpc.families.family import AnySize
from d2ft_hpc.families.timm_blocks import TimmRotary


class TimmNaFlex(AnySize, TimmRotary):
    supported = "NaFlexVit"
    names_below = ("embeds", "rope", "norm_pre")
    refuses_parts = "timm's NaFlexVit gives blocks masks and positions, which parts of it would not get"

    def has(self, model: nn.Module) -> bool:
        return isinstance(model, NaFlexVit)

    def below(self, model: Any, images: Tensor) -> tuple[Tensor, Any]:
        embedded = model._forward_embeds(images, None, None, None)
        return embedded["patches"], (embedded["rope_embeds"], model.rope_is_mixed)

    def tokens_between(self, model: Any) -> int | None:
        return None

    def image_shape(self, model: Any) -> tuple[int, int, int] | None:
        embed = model.embeds
        high, wide = embed.patch_size
        down, across = embed.pos_embed_grid_size
        height, width = embed.default_img_size or (down * high, across * wide)
        return int(embed.in_chans), int(height), int(width)

    def patch_size(self, model: Any) -> tuple[int, int]:
        high, wide = model.embeds.patch_size
        return int(high), int(wide)

    def embedding(self, model: Any) -> nn.Module | None:
        embed: nn.Module | None = model._modules.get("embeds")
        return embed
