"""timm's blocks of one attention and one MLP, whose norms come before or after either: all models share them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import NoneType
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock
from torch import Tensor, nn

from d2ft_hpc.families import timm_attention, timm_mlp
from d2ft_hpc.families.family import Branch, Drops, KernelParts, rate_of
from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.families.head_linear import out_of_heads
from d2ft_hpc.families.head_norm import norm_axes, normalise_heads
from d2ft_hpc.families.low_rank import unfit_layers
from d2ft_hpc.families.timm_attention import Positions, has_own_bias, positions_by_head
from d2ft_hpc.families.timm_models import TimmFamily, class_of_timm

DeepseekVitBlock = class_of_timm("models.deepseek_vit", "DeepseekVitBlock")

_PRE_NORM = (Block, EvaBlock, BeitBlock, RelPosBlock, DeepseekVitBlock)
_WHY = dict.fromkeys(
    ("ParallelScalingBlock", "DiffParallelScalingBlock"), "which has one matrix into attention and MLP"
) | {"ParallelThingsBlock": "which sums several attentions and several MLPs"}
"""Why other blocks of timm's cannot be cut."""
_POST_NORM = (ResPostBlock, EvaBlockPostNorm, ResPostRelPosBlock)


class TimmBlocks(TimmFamily):
    def misfits(self, block: Any) -> list[str]:
        if type(block) not in (*_PRE_NORM, *_POST_NORM):
            kind = type(block).__name__
            return [f"is a {kind}, {_WHY.get(kind, 'which no family knows')}"]
        attn, mlp = block.attn, block.mlp
        if reasons := timm_attention.misfits(attn) + timm_mlp.misfits(mlp):
            return reasons
        for name, (norm, _) in _across(block).items():
            if not (isinstance(norm, nn.LayerNorm) and norm.bias is not None):
                reasons.append(
                    f"normalises across heads by {name} of class {type(norm).__name__}, not LayerNorm"
                )
        if timm_mlp.norm_across(mlp) is not None and type(mlp) is Mlp and mlp.act(torch.zeros(1)).item() != 0:
            reasons.append("normalises hidden units whose activation of zero, as fills up heads, is not zero")
        return reasons + unfit_layers(block, self.layers(block))

    def num_heads(self, block: Any) -> int:
        return timm_attention.num_heads(block.attn)

    def layers(self, block: Any) -> Mapping[str, Sequence[str]]:
        return {
            "qkv": timm_attention.layers(block.attn),
            "proj": ("attn.proj",),
            "fc1": timm_mlp.layers(block.mlp),
            "fc2": (timm_mlp.last(block.mlp)[0],),
        }

    def biases(self, block: Any, layer: str) -> Mapping[str, slice]:
        return timm_attention.biases(block.attn, layer) or super().biases(block, layer)

    def calling(self, block: Any) -> AbstractContextManager[None] | None:
        return timm_attention.calling_qkv(block.attn) if has_own_bias(block.attn) else None

    def own_axes(self, block: Any) -> dict[str, HeadAxis]:
        return timm_attention.own_axes(block.attn) | timm_mlp.own_axes(block.mlp, self.num_heads(block))

    def cast_buffers(self, block: Any, dtype: torch.dtype) -> None:
        k_bias = getattr(block.attn, "k_bias", None)
        if k_bias is not None:
            block.attn.k_bias = k_bias.to(dtype)

    def norm_axes(self, block: Any) -> dict[str, HeadAxis]:
        heads = self.num_heads(block)
        of_each = (norm_axes(name, heads, channels) for name, (_, channels) in _across(block).items())
        return {name: axis for axes in of_each for name, axis in axes.items()}

    @abstractmethod
    def positions(self, *args: Any, **kwargs: Any) -> Positions:
        """Of what a block's forward takes beside x."""

    def branches(
        self, block: Any, axes: Mapping[str, HeadAxis], *args: Any, **kwargs: Any
    ) -> Sequence[Branch]:
        """An attention mask must broadcast over the heads."""
        attn, mlp = block.attn, block.mlp
        positions = self._positions(attn, *args, **kwargs)
        name, last = timm_mlp.last(mlp)
        before, after = _norms_and_scales(block)
        across = {of: partial(normalise_heads, norm, of, axes) for of, (norm, _) in _across(block).items()}
        return (
            Branch(
                before[0],
                lambda normed, heads: timm_attention.mix(attn, axes, normed, heads, positions),
                partial(out_of_heads, attn.proj, "attn.proj", axes),
                attn.proj.bias,
                lambda branch: block.drop_path1(after[0](attn.proj_drop(branch))),
                across.get("attn.norm"),
            ),
            Branch(
                lambda x: timm_mlp.normed(mlp, before[1](x)),
                lambda normed, heads: timm_mlp.activate(mlp, axes, normed, heads),
                partial(out_of_heads, last, name, axes),
                last.bias,
                lambda branch: block.drop_path2(after[1](timm_mlp.drops(mlp)[1](branch))),
                across.get("mlp.norm"),
            ),
        )

    def _positions(self, attn: Any, *args: Any, **kwargs: Any) -> Positions:
        """With what the attention itself adds by head. Raises ValueError for a mask that differs between heads."""
        given = self.positions(*args, **kwargs)
        if given.mask is not None and given.mask.dim() > 3 and given.mask.shape[1] > 1:
            raise ValueError("an attention mask that differs between heads is not supported under a plan")
        return given._replace(by_head=positions_by_head(attn, given.by_head))

    def drops(self, block: Any) -> Drops:
        of_units, of_result = timm_mlp.drops(block.mlp)
        return Drops(
            {"attn.attn_drop": block.attn.attn_drop, "mlp.drop1": of_units},
            (block.attn.proj_drop, of_result),
            (block.drop_path1, block.drop_path2),
        )

    def set_heads(self, block: Any, heads: int) -> None:
        timm_attention.set_heads(block.attn, heads)

    def kernel_parts(self, block: Any) -> KernelParts | None:
        attn, mlp = block.attn, block.mlp
        if type(block) not in _PRE_NORM or type(mlp) is not Mlp or attn.qkv is None or has_own_bias(attn):
            return None
        linear, norms = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2), (block.norm1, block.norm2)
        drops = self.drops(block)
        fits = (
            all(type(layer) is nn.Linear for layer in linear)
            and mlp.fc1.out_features % attn.num_heads == 0
            and all(
                isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None
                for norm in norms
            )
            and not _across(block)
            and all(
                type(getattr(block, name, None)) in (nn.Identity, LayerScale, NoneType)
                for name in ("ls1", "ls2")
            )
            and getattr(attn, "rel_pos", None) is None  # it may draw random numbers, once for all heads
            and type(mlp.act) is nn.GELU
            and mlp.act.approximate == "none"
            and all(
                isinstance(drop, nn.Identity | nn.Dropout | DropPath) and rate_of(drop) == 0
                for drop in (mlp.drop1, *drops.by_token, *drops.by_sample)
            )
        )
        if not fits:
            return None

        def attend(
            query: Tensor, key: Tensor, value: Tensor, heads: Tensor, *args: Any, **kwargs: Any
        ) -> Tensor:
            return timm_attention.attend(
                attn, query, key, value, heads, self._positions(attn, *args, **kwargs)
            )

        scale1, scale2 = (partial(_scale, block, number) for number in (1, 2))
        is_plain = timm_attention.is_plain(attn)
        return KernelParts(
            block.norm1, attn.qkv, attend, is_plain, attn.proj, scale1, block.norm2, mlp.fc1, mlp.fc2, scale2
        )


class TimmRotary(TimmBlocks):
    """Models that give each block rotary positions. `below` gives them, and whether each block has its own."""

    def goes_beside(self, name: str) -> bool:
        return name.startswith("rope.")

    def arguments(self, beside: Any, index: int) -> Mapping[str, Any]:
        rope, is_by_depth = beside
        return {} if rope is None else {"rope": rope[index] if is_by_depth else rope}

    def positions(
        self, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Positions:
        return Positions(rope, attn_mask, is_causal)


_OnTokens = Callable[[Tensor], Tensor]


def _across(block: Any) -> dict[str, tuple[Any, int]]:
    """The norms between heads and the layers that lead out of them, by name: each with the number of its channels,
    which are those of all heads."""
    attn, (_, last) = block.attn, timm_mlp.last(block.mlp)
    norms = {
        "attn.norm": (timm_attention.norm_across(attn), attn.proj.in_features),
        "mlp.norm": (timm_mlp.norm_across(block.mlp), last.in_features),
    }
    return {name: (norm, channels) for name, (norm, channels) in norms.items() if norm is not None}


def _scale(block: Any, number: int) -> Tensor | None:
    """The parameter by which channels of the block's first or second branch are scaled."""
    named = block if hasattr(block, f"gamma_{number}") else getattr(block, f"ls{number}", None)
    gamma: Tensor | None = getattr(named, f"gamma_{number}" if named is block else "gamma", None)
    return gamma


def _norms_and_scales(block: Any) -> tuple[tuple[_OnTokens, _OnTokens], tuple[_OnTokens, _OnTokens]]:
    """What attention and MLP do before the heads, and after the sum over them."""
    if type(block) in _POST_NORM:
        return (nn.Identity(), nn.Identity()), (block.norm1, block.norm2)

    def scaled(number: int) -> _OnTokens:
        if (module := getattr(block, f"ls{number}", None)) is not None:
            return module  # type: ignore[no-any-return]
        gamma = _scale(block, number)
        return lambda branch: branch if gamma is None else gamma * branch

    return (block.norm1, block.norm2), (scaled(1), scaled(2))
