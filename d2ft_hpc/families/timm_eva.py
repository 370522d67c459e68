"""timm's Eva: EVA-02, DINOv3, Perception Encoder, other ViTs with rotary positions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from timm.models.eva import Eva
from torch import Tensor, nn

from d2ft_hpc.errors import ConfigError
from d2ft_hpc.families.timm_blocks import TimmRotary
from d2ft_hpc.families.timm_models import patches


class TimmEva(TimmRotary):
    """A subnet is a group of query heads with its key and value head, and its slice of the (gated) MLP."""

    supported = "Eva"
    names_below = ("patch_embed", "pos_embed", "cls_token", "reg_token", "rope", "norm_pre")
    names_sized = ("patch_embed", "rope")
    refuses_parts = "timm's Eva gives each block rotary positions, which parts of it would not get"

    def has(self, model: nn.Module) -> bool:
        return isinstance(model, Eva)

    def below(self, model: Any, images: Tensor) -> tuple[Tensor, Any]:
        x, rope = model._pos_embed(patches(model.patch_embed, images))
        is_by_depth = rope is not None and getattr(model, "rope_mixed", False)
        return model.norm_pre(x), (rope, is_by_depth)

    def take_any_size(self, model: Any) -> None:
        super().take_any_size(model)
        _take_any_shape(model.rope)

    def let_graphs_capture(self, model: Any) -> None:
        if getattr(model.rope, "aug_active", False):
            raise ConfigError(
                "the model draws its rotary positions anew in each step (rope_shift_coords, rope_jitter_coords, "
                "rope_rescale_coords), which CUDA graphs cannot: set engine.cuda_graphs=false"
            )
        if isinstance(model.rope, RotaryEmbeddingDinoV3) and "get_embed" not in vars(model.rope):
            vars(model.rope)["get_embed"] = _AnyShape(model.rope)


def _take_any_shape(rope: Any) -> None:
    if getattr(rope, "feat_shape", None) is not None and "get_embed" not in vars(rope):
        vars(rope)["get_embed"] = _AnyShape(rope)


class _AnyShape:
    """Rotary positions of any grid, where timm has made those of one, or makes them on the processor each time:
    `get_embed` of such a module."""

    def __init__(self, rope: Any) -> None:
        self.rope = rope
        self.of_other_shapes: dict[Any, Any] = {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        rope = self.rope
        if isinstance(rope, RotaryEmbeddingDinoV3):
            return self._made_once(None if shape is None else tuple(shape), dtype)
        own = type(rope).get_embed
        given = {} if dtype is None else {"dtype": dtype}
        if shape is None or tuple(shape) == tuple(rope.feat_shape):
            embedded: Tensor = own(rope, **given)
        elif isinstance(rope, RotaryEmbeddingCat):  # others heed the shape
            embedded = own(self._shaped(tuple(shape)), **given)
        else:
            embedded = own(rope, shape=tuple(shape), **given)
        return embedded

    def _made_once(self, shape: tuple[int, ...] | None, dtype: torch.dtype | None) -> Tensor:
        own, rope = type(self.rope).get_embed, self.rope
        given = {} if dtype is None else {"dtype": dtype}
        if rope.training and rope.aug_active:
            drawn: Tensor = own(rope, shape=shape, **given)
            return drawn
        key = shape, dtype, rope.periods.device, rope.periods.dtype
        if key not in self.of_other_shapes:
            with torch.inference_mode(False), torch.no_grad():  # a backward may need what an evaluation made
                self.of_other_shapes[key] = own(rope, shape=shape, **given)
        made: Tensor = self.of_other_shapes[key]
        return made

    def _shaped(self, shape: tuple[int, ...]) -> Any:
        key = shape, self.rope.pos_embed.device, self.rope.pos_embed.dtype
        if key not in self.of_other_shapes:
            twin = copy.copy(self.rope)
            vars(twin).pop("get_embed", None)
            twin._buffers = {name: None if b is None else b.clone() for name, b in twin._buffers.items()}
            twin.update_feat_shape(list(shape))
            self.of_other_shapes[key] = twin
        twin = self.of_other_shapes[key]
        twin.training = self.rope.training
        return twin
