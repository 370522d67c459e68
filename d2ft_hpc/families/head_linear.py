"""Linear layers of some heads. Weights that are copied here are not kept for the backward, which copies them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2ft_hpc.families.head_axis import HeadAxis, TakenHeads
from d2ft_hpc.families.low_rank import with_lora


def into_heads(layer: Any, name: str, axes: Mapping[str, HeadAxis], x: Tensor, heads: Tensor) -> Tensor:
    """`x` through what the heads own of a layer whose rows they share: [..., own rows].

    name: of the layer in its block. axes: by names in the block. heads: int64 [n], in rising order.
    """
    bias = None if layer.bias is None else head_part(axes[f"{name}.bias"], layer.bias, heads)
    output = head_linear(axes[f"{name}.weight"], x, layer.weight, bias, heads)
    return with_lora(layer, name, axes, x, heads, output)


def out_of_heads(
    layer: Any, name: str, axes: Mapping[str, HeadAxis], x: Tensor, heads: Tensor, bias: Tensor | None
) -> Tensor:
    """`x`, which the heads gave, through what they own of a layer whose columns they share, plus `bias`."""
    output = head_linear(axes[f"{name}.weight"], x, layer.weight, bias, heads)
    return with_lora(layer, name, axes, x, heads, output)


def head_part(axis: HeadAxis, parameter: Tensor, heads: Tensor) -> Tensor:
    """The heads' part of a parameter. As heads are in rising order, all of them are the parameter, without a copy."""
    if not isinstance(axis, TakenHeads) and _are_all(axis, heads):
        # A view, because autocast would cache a leaf's cast without gradient.
        return parameter.view_as(parameter)
    return axis.select(parameter, heads)


def head_linear(axis: HeadAxis, x: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor) -> Tensor:
    """`x` through the rows or columns of `weight` that the heads own; its gradient has the weight's full shape.

    x: [..., in]. bias: of what comes out. heads: int64 [n], in rising order.
    """
    if isinstance(axis, TakenHeads) or _are_all(axis, heads) or not torch.is_grad_enabled():
        return F.linear(x, head_part(axis, weight, heads), bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # so that this is what is kept
    # Rows, because the result of a custom function must not be a view if something is added to it in place.
    rows = x.flatten(0, -2)
    result: Tensor = _HeadLinear.apply(
        rows, weight, bias, heads, axis.view_shape, axis.axis, axis.splits_rows, axis.units
    )
    return result.view(*x.shape[:-1], -1)


def _are_all(axis: HeadAxis, heads: Tensor) -> bool:
    return heads.numel() == axis.heads


class _HeadLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor, *axis: Any
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, heads)
        ctx.axis, ctx.bias_dtype = axis, None if bias is None else bias.dtype
        return F.linear(rows, HeadAxis(*axis).select(weight, heads), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, heads = ctx.saved_tensors
        axis, wanted = HeadAxis(*ctx.axis), ctx.needs_input_grad
        of_rows = gradient @ axis.select(weight, heads).to(gradient.dtype) if wanted[0] else None
        of_weight = axis.spread((gradient.t() @ rows).to(weight.dtype), heads) if wanted[1] else None
        of_bias = gradient.sum(0).to(ctx.bias_dtype) if wanted[2] else None
        return of_rows, of_weight, of_bias, *[None] * 5
