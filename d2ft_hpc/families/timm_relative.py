"""timm's Beit and VisionTransformerRelPos: positions relative to each other, added to the scores by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from d2ft_hpc.errors import UnsupportedModelError
from d2ft_hpc.families.timm_attention import Positions
from d2ft_hpc.families.timm_blocks import TimmBlocks
from d2ft_hpc.families.timm_models import patches


class TimmRelative(TimmBlocks):
    """Tables of positions belong to no head, although each head reads its own column."""

    supported = "Beit, VisionTransformerRelPos"
    names_below = ("patch_embed", "pos_embed", "cls_token", "rel_pos_bias", "shared_rel_pos")
    refuses_parts = "timm's relative positions lie in one table for all heads, which cannot be cut for ranks"

    def has(self, model: nn.Module) -> bool:
        return isinstance(model, Beit | VisionTransformerRelPos)

    def below(self, model: Any, images: Tensor) -> tuple[Tensor, Any]:
        x = patches(model.patch_embed, images)
        if model.cls_token is not None:
            x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1)
        if isinstance(model, VisionTransformerRelPos):
            shared = model.shared_rel_pos
            return x, {"shared_rel_pos": None if shared is None else shared.get_bias()}
        if model.pos_embed is not None:
            x = x + model.pos_embed
        shared = model.rel_pos_bias
        return model.pos_drop(x), {"shared_rel_pos_bias": None if shared is None else shared()}

    def goes_beside(self, name: str) -> bool:
        return name.startswith(("rel_pos_bias.", "shared_rel_pos."))

    def arguments(self, beside: Any, index: int) -> Mapping[str, Any]:
        return beside  # type: ignore[no-any-return]

    def positions(
        self, shared_rel_pos: Tensor | None = None, *, shared_rel_pos_bias: Tensor | None = None
    ) -> Positions:
        return Positions(by_head=shared_rel_pos if shared_rel_pos_bias is None else shared_rel_pos_bias)

    def take_any_size(self, model: Any) -> None:
        raise UnsupportedModelError(
            f"this {type(model).__name__} has relative positions for one image size only: use a planner that leaves "
            f"images as they are, such as joint"
        )
