"""A block under a plan as a dense block of fewer heads: what these own of its parameters is copied together before the
block runs, in a launch or two, and gradients go back to their places in as many. What runs in between indexes no
weights, whatever the family: gated MLPs, rotary positions, grouped queries, LoRA. torch.compile makes of it what it
makes of a dense block.

The copies are kept for the backward, in the type that the products run in, as autocast keeps weights that it has cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from d2ft_hpc.execution.accumulation import Accumulator, accumulator_of, add
from d2ft_hpc.execution.block import BlockHeads, HeadAxes, PartAxes
from d2ft_hpc.families.head_axis import HeadAxis, TakenHeads
from d2ft_hpc.families.low_rank import parameter_of


def take_parts(block: nn.Module, heads: BlockHeads, part_axes: HeadAxes, device_type: str) -> PartAxes:
    """The splits by which `run_block` computes with copies of what its heads own. part_axes: the block's
    `SubnetMap.part_axes`. device_type: of the input, whose autocast decides the copies' type."""
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    named = {name: parameter_of(block, name) for name in part_axes}
    # LoRA's layers have two names for one weight.
    distinct = {id(parameter): (parameter, part_axes[name]) for name, parameter in named.items()}
    parameters, axes = zip(*distinct.values(), strict=True)

    def taken(parts: Sequence[Tensor]) -> HeadAxes:
        of_parameter = dict(zip(distinct, parts, strict=True))
        return {
            name: TakenHeads(**vars(part_axes[name]), part=of_parameter[id(parameter)])
            for name, parameter in named.items()
        }

    full, forward_only = part_axes, None
    if heads.full is not None:
        full = taken(_TakeHeads.apply(heads, axes, dtype, *parameters))
    if 0 < heads.num_forward_only < heads.places.numel():
        with torch.no_grad():
            forward_only = taken(_take(parameters, axes, heads.order[heads.num_full :], dtype))
    return PartAxes(full, forward_only)


class _TakeHeads(torch.autograd.Function):
    """What FULL heads own of the parameters."""

    @staticmethod
    def forward(
        ctx: Any, heads: BlockHeads, axes: Sequence[HeadAxis], dtype: torch.dtype | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        assert heads.full is not None
        ctx.heads, ctx.axes = heads, axes
        ctx.accumulators = [accumulator_of(parameter) for parameter in parameters]
        ctx.save_for_backward(*parameters)
        ctx.set_materialize_grads(False)
        parts = _take(parameters, axes, heads.full, dtype)
        frozen = (part for part, p in zip(parts, parameters, strict=True) if not p.requires_grad)
        ctx.mark_non_differentiable(*frozen)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        parameters: tuple[Tensor, ...] = ctx.saved_tensors
        given = {index: gradient for index, gradient in enumerate(gradients) if gradient is not None}
        whole = _spread(
            list(given.values()),
            [parameters[index] for index in given],
            [ctx.accumulators[index] for index in given],
            [ctx.axes[index] for index in given],
            ctx.heads,
        )
        by_index = dict(zip(given, whole, strict=True))
        return None, None, None, *(by_index.get(index) for index in range(len(parameters)))


def _take(
    parameters: Sequence[Tensor], axes: Sequence[HeadAxis], heads: Tensor, dtype: torch.dtype | None
) -> list[Tensor]:
    if not parameters[0].is_cuda:
        return [
            axis.select(parameter, heads).to(dtype or parameter.dtype)
            for parameter, axis in zip(parameters, axes, strict=True)
        ]
    from d2ft_hpc.execution import kernels

    slices = [slices_of(axis) for axis in axes]
    whole = [parameter.contiguous() for parameter in parameters]
    flat = kernels.take_heads(whole, slices, heads, axes[0].heads, dtype)
    return [
        part.view(-1, *parameter.shape[1:]) if axis.splits_rows else part.view(parameter.shape[0], -1)
        for part, parameter, axis in zip(flat, parameters, axes, strict=True)
    ]


def _spread(
    parts: Sequence[Tensor],
    likes: Sequence[Tensor],
    accumulators: Sequence[Accumulator | None],
    axes: Sequence[HeadAxis],
    heads: BlockHeads,
) -> Sequence[Tensor | None]:
    """Gradients like the whole parameters `likes`, zeros for all heads but the FULL ones; None where an accumulator has
    taken them."""
    assert heads.full is not None
    if not parts or not parts[0].is_cuda:
        whole = [
            axis.spread(part.to(like.dtype), heads.full)
            for part, like, axis in zip(parts, likes, axes, strict=True)
        ]
        add(whole, accumulators)
        return [None if taken else gradient for gradient, taken in zip(whole, accumulators, strict=True)]
    from d2ft_hpc.execution import kernels

    slices = [slices_of(axis) for axis in axes]
    flat = [part.contiguous() for part in parts]
    return kernels.put_heads(flat, likes, accumulators, slices, heads.places, heads.num_full)


def slices_of(axis: HeadAxis) -> Any:
    """How the kernels copy a parameter that splits so: `kernels.HeadSlices`."""
    from d2ft_hpc.execution.kernels import HeadSlices

    outer, units = prod(axis.view_shape[: axis.axis]), axis.units or 0
    inner = prod(axis.view_shape[axis.axis + (2 if units else 1) :])
    return HeadSlices(outer, inner, rows=False, units=units)
