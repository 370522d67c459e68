"""timm's vision encoders of language models: Qwen3's and DeepSeek's, alone or in their classifiers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from d2ft_hpc.families.family import AnySize
from d2ft_hpc.families.timm_blocks import TimmRotary
from d2ft_hpc.families.timm_models import class_of_timm, patches

_KINDS = tuple(
    kind
    for kind in (
        class_of_timm("models.qwen3_vit", "Qwen3VitEncoder"),
        class_of_timm("models.deepseek_vit", "DeepseekVitEncoder"),
    )
    if kind is not None
)


class TimmEncoder(AnySize, TimmRotary):
    """Not composed of `below` and `above`: joining neighbouring tokens after the blocks needs the grid, which the
    blocks' result does not tell."""

    supported = "vision encoders of Qwen3 and DeepSeek"
    names_below = ("patch_embed", "pos_embed", "rope")
    refuses_parts = "timm's encoders give each block rotary positions, which parts of one would not get"
    is_composed = False

    def has(self, model: nn.Module) -> bool:
        return isinstance(model, _KINDS)

    def below(self, model: Any, images: Tensor) -> tuple[Tensor, Any]:
        x, rope = model._pos_embed(patches(model.patch_embed, images))
        return x, (rope, False)

    def tokens_between(self, model: Any) -> int | None:
        return None

    def tokens(self, model: Any, height: int, width: int) -> int:
        high, wide = super().patch_size(model)
        return height // high * (width // wide)

    def patch_size(self, model: Any) -> tuple[int, int]:
        """If patches are joined above the blocks, the size of what becomes one token there, since images must hold
        whole ones."""
        high, wide = super().patch_size(model)
        joined = 1 if getattr(model, "merger", None) is None else int(model.merge_size)
        return joined * high, joined * wide
