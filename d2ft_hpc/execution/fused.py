"""A block under a plan in about as many GPU kernels as a dense one (`run_block` says what it computes).

Three pieces, so that autograd and any attention kernel stay usable between them:

- `_Enter`: norm1 and qkv of the FULL heads and, without gradient, of the FORWARD_ONLY ones.
- attention of either, by PyTorch; q/k norms and masks go with it.
- `_Leave`: proj, residual, norm2, the FFN's slices and the residual again.

The weights of the chosen heads are copied together (a few MB, in one launch, in the type that the products run in) and
kept for the backward, as autocast keeps the weights that it has cast; where an engine gathers weights block by block
the backward copies them again. Products into the heads run separately for FULL and FORWARD_ONLY heads, so that only
results of FULL ones are kept; products out of them run once, over both. Weight gradients are computed for FULL heads
and spread into full shapes by one launch, without a dense-sized temporary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ft_hpc.execution.accumulation import Accumulator, accumulator_of
from d2ft_hpc.execution.block import BlockHeads
from d2ft_hpc.execution.kernels import (
    HeadSlices,
    Norm,
    Normed,
    add_branch,
    add_branch_and_normalise,
    branch_backward,
    gelu_backward,
    gelu_join,
    join_heads,
    join_qkv,
    norm_backward,
    normalise,
    put_heads,
    sum_partials,
    take_heads,
)
from d2ft_hpc.families.family import KernelParts


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run_fused(
    parts: KernelParts,
    x: Tensor,
    heads: BlockHeads,
    following: KernelParts | None = None,
    keeps: bool = True,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Runs a block with at least one FULL head. x: [sample, token, channel]; returns the same shape and dtype.

    following: parts of the next block, if its first norm may be computed with the result. keeps: whether the weights
    of the chosen heads stay in memory until the backward. args, kwargs: what the block's forward takes beside x.
    """
    qkv_layer, proj_layer, fc1_layer, fc2_layer = parts.qkv, parts.proj, parts.fc1, parts.fc2
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    norm1, norm2 = parts.norm1, parts.norm2
    normed = _normed_ahead(x, norm1, dtype)
    if normed is None:
        normed = normalise(x.detach().flatten(0, -2), _norm(norm1), dtype)
    qkv, qkv_bias, proj, fc1, fc2, fc1_bias = _take(
        [
            qkv_layer.weight,
            qkv_layer.bias,
            proj_layer.weight,
            fc1_layer.weight,
            fc2_layer.weight,
            fc1_layer.bias,
        ],
        [*_qkv_slices(qkv_layer.weight, heads), *_leave_slices(proj_layer.weight, fc1_layer.weight, heads)],
        heads.order,
        heads,
        dtype,
    )
    x, query, key, value, *others = _Enter.apply(
        x,
        norm1.weight,
        norm1.bias,
        qkv_layer.weight,
        qkv_layer.bias,
        heads,
        norm1.eps,
        normed,
        qkv,
        qkv_bias,
        keeps,
        [accumulator_of(each) for each in (qkv_layer.weight, qkv_layer.bias)],
    )
    mixed, beside = parts.attend(query, key, value, heads.full, *args, **kwargs), None
    if others:
        query, key, value = others
        with torch.no_grad():
            beside = parts.attend(query, key, value, heads.forward_only, *args, **kwargs)
    ahead = (
        following.norm1 if following is not None and type(following.norm1.weight) is nn.Parameter else None
    )
    result, *following_normed = _Leave.apply(
        x,
        mixed,
        beside,
        proj_layer.weight,
        proj_layer.bias,
        parts.scale1(),
        norm2.weight,
        norm2.bias,
        fc1_layer.weight,
        fc1_layer.bias,
        fc2_layer.weight,
        fc2_layer.bias,
        parts.scale2(),
        heads,
        norm2.eps,
        None if ahead is None else _norm(ahead),
        (proj, fc1, fc2, fc1_bias),
        keeps,
        [
            accumulator_of(each)
            for each in (proj_layer.weight, fc1_layer.weight, fc2_layer.weight, fc1_layer.bias)
        ],
    )
    if ahead is not None:
        result._d2ft_ahead = _Ahead(ahead.weight, result._version, Normed(*following_normed))
    return result  # type: ignore[no-any-return]


class _Ahead(NamedTuple):
    """What a block stores with its result for the next one: that block's norm weight, the result's version, and its
    norm."""

    weight: nn.Parameter
    version: int
    normed: Normed


def _normed_ahead(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Normed | None:
    """The norm that the block below has computed with its last sum; None if it was another norm."""
    ahead: _Ahead | None = getattr(x, "_d2ft_ahead", None)
    if ahead is None or ahead.version != x._version:
        return None
    if ahead.weight is not norm.weight and ahead.weight.data_ptr() != norm.weight.data_ptr():
        return None
    return ahead.normed if ahead.normed.rows.dtype == dtype else None


class _Summed(NamedTuple):
    """What a block stores with its input's gradient for the block below: the version, and the sum over tokens, which
    is the gradient of that block's last bias."""

    version: int
    sum: Tensor


def _summed_already(gradient: Tensor) -> Tensor | None:
    """The sum that the block above has computed with its last kernel; None if the gradient came from other places,
    too."""
    summed: _Summed | None = getattr(gradient, "_d2ft_summed", None)
    return None if summed is None or summed.version != gradient._version else summed.sum


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)


class _Enter(torch.autograd.Function):
    """(x, q, k, v) of FULL heads, each [sample, head, token, channel], and q, k, v of FORWARD_ONLY ones.

    x is returned as well, so that its gradients past the branch and through it meet in one kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        heads: BlockHeads,
        epsilon: float,
        normed: Normed,
        taken: Tensor,
        taken_bias: Tensor | None,
        keeps: bool,
        accumulators: Sequence[Accumulator | None],
    ) -> tuple[Tensor, ...]:
        """accumulators: of the weight and the bias."""
        samples, tokens, channels = x.shape
        rows = x.reshape(-1, channels)
        size = taken.shape[0] // (3 * heads.order.numel())
        results = [
            _into_heads(normed.rows, taken, taken_bias, start * 3 * size, end * 3 * size)
            .view(samples, tokens, end - start, 3, size)
            .permute(3, 0, 2, 1, 4)
            .unbind(0)
            for start, end in ((0, heads.num_full), (heads.num_full, heads.order.numel()))
            if end > start
        ]
        ctx.save_for_backward(
            rows,
            norm_weight,
            norm_bias,
            weight,
            bias,
            normed.rows,
            normed.mean,
            normed.rstd,
            taken[: heads.num_full * 3 * size] if keeps else None,
        )
        ctx.heads, ctx.epsilon, ctx.accumulators = heads, epsilon, accumulators
        if len(results) > 1:
            ctx.mark_non_differentiable(*results[1])
        ctx.set_materialize_grads(False)
        return (x.view_as(x), *(each for result in results for each in result))

    @staticmethod
    def backward(
        ctx: Any, past: Tensor, of_query: Tensor, of_key: Tensor, of_value: Tensor, *beside: None
    ) -> tuple[Tensor | None, ...]:
        rows, norm_weight, norm_bias, weight, bias, normed, mean, rstd, taken = ctx.saved_tensors
        heads, slices = ctx.heads, _qkv_slices(weight, ctx.heads)
        joined, joined_sums = join_qkv(of_query, of_key, of_value, normed.dtype)
        if taken is None:
            (taken,) = _take([weight], slices[:1], heads.full, heads, normed.dtype)
        of_normed = joined @ taken
        result, norm_sums = norm_backward(
            of_normed,
            rows,
            Normed(normed, mean, rstd),
            Norm(norm_weight, norm_bias, ctx.epsilon),
            past.reshape(rows.shape),
        )
        of_bias, of_norm = sum_partials([joined_sums, norm_sums], [torch.float32, norm_weight.dtype])
        of_norm_weight, of_norm_bias, summed = of_norm.view(3, -1)
        own = _spread_wanted(
            [
                (weight, slices[0], lambda: joined.t() @ normed),
                (bias, slices[1], lambda: of_bias),
            ],
            ctx.needs_input_grad[3:5],
            ctx.accumulators,
            heads,
        )
        of_x: Any = result.view(past.shape)
        of_x._d2ft_summed = _Summed(of_x._version, summed)
        return of_x, of_norm_weight, of_norm_bias, *own, *[None] * 7


class _Leave(torch.autograd.Function):
    """From the heads' attention to the block's output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mixed: Tensor,
        beside: Tensor | None,
        proj: Tensor,
        proj_bias: Tensor | None,
        scale1: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        fc1: Tensor,
        fc1_bias: Tensor | None,
        fc2: Tensor,
        fc2_bias: Tensor | None,
        scale2: Tensor | None,
        heads: BlockHeads,
        epsilon: float,
        following: Norm | None,
        taken: tuple[Tensor, Tensor, Tensor, Tensor | None],
        keeps: bool,
        accumulators: Sequence[Accumulator | None],
    ) -> tuple[Tensor, ...]:
        """accumulators: of proj, fc1, fc2 and fc1_bias."""
        taken_proj, taken_fc1, taken_fc2, taken_bias = taken
        rows = x.reshape(-1, x.shape[-1])
        branch1 = join_heads(mixed, beside) @ taken_proj.t()
        norm = Norm(norm_weight, norm_bias, epsilon)
        middle, normed = add_branch_and_normalise(rows, branch1, proj_bias, scale1, norm)
        num_heads, full = heads.order.numel(), heads.num_full
        size, units = taken_proj.shape[1] // num_heads, taken_fc2.shape[1] // num_heads
        hidden = _into_heads(normed.rows, taken_fc1, taken_bias, 0, full * units)
        others = None
        if heads.num_forward_only:
            others = _into_heads(normed.rows, taken_fc1, taken_bias, full * units, num_heads * units)
        branch2 = gelu_join(hidden, others) @ taken_fc2.t()
        ahead: tuple[Tensor, ...] = ()
        if following is None:
            result = add_branch(middle, branch2, fc2_bias, scale2)
        else:
            result, beyond = add_branch_and_normalise(middle, branch2, fc2_bias, scale2, following)
            ahead = (beyond.rows, beyond.mean, beyond.rstd)
            ctx.mark_non_differentiable(*ahead)
        ctx.save_for_backward(
            *(proj, proj_bias, scale1, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias, scale2),
            *(mixed, middle, normed.rows, normed.mean, normed.rstd, hidden),
            # The scales' gradients need what they scaled.
            *(None if scale1 is None else branch1, None if scale2 is None else branch2),
            *(
                (taken_proj[:, : full * size], taken_fc1[: full * units], taken_fc2[:, : full * units])
                if keeps
                else ()
            ),
        )
        ctx.heads, ctx.epsilon, ctx.accumulators = heads, epsilon, accumulators
        ctx.set_materialize_grads(False)
        return result.view(x.shape), *ahead

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *ahead: None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        proj, proj_bias, scale1, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias, scale2 = saved[:10]
        mixed, middle, normed, mean, rstd, hidden, branch1, branch2, *taken = saved[10:]
        heads, dtype = ctx.heads, normed.dtype
        slices = _leave_slices(proj, fc1, heads)
        taken_proj, taken_fc1, taken_fc2 = taken or _take(
            [proj, fc1, fc2], slices[:3], heads.full, heads, dtype
        )
        rows = gradient.reshape(middle.shape)
        of_branch2, of_fc2_bias, of_scale2 = rows, _summed_already(gradient), None
        branch_sums: list[Tensor] = []
        if of_fc2_bias is None or scale2 is not None or gradient.dtype != dtype:
            of_branch2, sums = branch_backward(rows, branch2, fc2_bias, scale2, dtype)
            branch_sums.append(sums)
        of_hidden, activated, hidden_sums = gelu_backward(of_branch2 @ taken_fc2, hidden)
        of_middle, norm_sums = norm_backward(
            of_hidden @ taken_fc1,
            middle,
            Normed(normed, mean, rstd),
            Norm(norm_weight, norm_bias, ctx.epsilon),
            rows,
        )
        of_branch1 = of_middle
        is_middle_scaled = scale1 is not None or of_middle.dtype != dtype
        if is_middle_scaled:
            of_branch1, sums = branch_backward(of_middle, branch1, proj_bias, scale1, dtype)
            branch_sums.append(sums)
        hidden_sum, of_norm, *of_branches = sum_partials(
            [hidden_sums, norm_sums, *branch_sums],
            [torch.float32, norm_weight.dtype, *[torch.float32] * len(branch_sums)],
        )
        of_norm_weight, of_norm_bias, of_proj_bias = of_norm.view(3, -1)
        of_scale1 = None
        if is_middle_scaled:
            of_proj_bias, of_scale1 = of_branches.pop().view(2, -1)
        if of_branches:
            of_fc2_bias, of_scale2 = of_branches.pop().view(2, -1)
        of_attention = of_branch1 @ taken_proj
        samples, full, tokens, size = mixed.shape
        wanted = ctx.needs_input_grad
        of_proj, of_fc1, of_fc2, of_fc1_bias = _spread_wanted(
            [
                (proj, slices[0], lambda: of_branch1.t() @ join_heads(mixed, None)),
                (fc1, slices[1], lambda: of_hidden.t() @ normed),
                (fc2, slices[2], lambda: of_branch2.t() @ activated),
                (fc1_bias, slices[3], lambda: hidden_sum),
            ],
            [wanted[3], wanted[8], wanted[10], wanted[9]],
            ctx.accumulators,
            heads,
        )
        return (
            of_middle.view(gradient.shape),
            of_attention.view(samples, tokens, full, size).transpose(1, 2),
            None,
            of_proj,
            _like(proj_bias, of_proj_bias),
            _like(scale1, of_scale1),
            of_norm_weight,
            of_norm_bias,
            of_fc1,
            of_fc1_bias,
            of_fc2,
            _like(fc2_bias, of_fc2_bias),
            _like(scale2, of_scale2),
            *[None] * 6,
        )


def _into_heads(normed: Tensor, weight: Tensor, bias: Tensor | None, start: int, end: int) -> Tensor:
    return F.linear(normed, weight[start:end], None if bias is None else bias[start:end])


def _like(parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return None if parameter is None or gradient is None else gradient.to(parameter.dtype)


def _spread_wanted(
    parts: Sequence[tuple[Tensor | None, HeadSlices, Callable[[], Tensor]]],
    wanted: Sequence[bool],
    accumulators: Sequence[Accumulator | None],
    heads: BlockHeads,
) -> list[Tensor | None]:
    """Full-shaped gradients of the parameters that need one; None for the others, and for those whose gradient is added
    to what an accumulator has.

    parts: a parameter, its slices, and what computes the FULL heads' part of its gradient.
    """
    present = {
        index: (parameter, accumulators[index], slices, compute)
        for index, ((parameter, slices, compute), is_wanted) in enumerate(zip(parts, wanted, strict=True))
        if is_wanted and parameter is not None
    }
    if not present:
        return [None] * len(parts)
    likes, own, slices, computes = zip(*present.values(), strict=True)
    gradients = [compute() for compute in computes]
    put = put_heads(gradients, likes, own, slices, heads.places, heads.num_full)
    by_index = dict(zip(present, put, strict=True))
    return [by_index.get(index) for index in range(len(parts))]


def _take(
    parameters: Sequence[Tensor | None],
    slices: Sequence[HeadSlices],
    chosen: Tensor | None,
    heads: BlockHeads,
    dtype: torch.dtype,
) -> list[Any]:
    """The part of the `chosen` ones of `heads` in `dtype`, in one launch; None for None.

    Weights into heads: [chosen x out, channel]. Weights out of heads: [channel, chosen x in]. Biases: [chosen x out].
    """
    assert chosen is not None
    present = [index for index, parameter in enumerate(parameters) if parameter is not None]
    own = [parameter for parameter in parameters if parameter is not None]
    own_slices = [slices[index] for index in present]
    flat = take_heads(own, own_slices, chosen, heads.places.numel(), dtype)
    results: list[Tensor | None] = [None] * len(parameters)
    for index, taken, parameter, each in zip(present, flat, own, own_slices, strict=True):
        if parameter.dim() == 1:
            results[index] = taken
        else:
            results[index] = taken.view(-1, parameter.shape[1]) if each.rows else taken.view(each.outer, -1)
    return results


def _qkv_slices(weight: Tensor, heads: BlockHeads) -> list[HeadSlices]:
    """The slices of qkv's weight and bias."""
    size = weight.shape[0] // (3 * heads.places.numel())
    return [HeadSlices(3, size * weight.shape[1], rows=True), HeadSlices(3, size, rows=True)]


def _leave_slices(proj: Tensor, fc1: Tensor, heads: BlockHeads) -> list[HeadSlices]:
    """The slices of the weights of proj, fc1 and fc2, and of fc1's bias."""
    of = heads.places.numel()
    units = fc1.shape[0] // of
    return [
        HeadSlices(proj.shape[0], proj.shape[1] // of, rows=False),
        HeadSlices(1, units * fc1.shape[1], rows=True),
        HeadSlices(proj.shape[0], units, rows=False),
        HeadSlices(1, units, rows=True),
    ]
