"""Kernels for what lies between a block's matrix products under a plan.

Matrix products and attention stay the libraries'. These Triton kernels move the weights of the chosen heads and fuse
what is bound by memory: residual, norm, GELU, and the sums over tokens that biases and norms take as gradients. All
compute in fp32, read and write any floating type, and are deterministic: sums over tokens go through partial sums, fp32
[program, width], which `sum_partials` adds up, not through atomics.

Tokens are rows [token, channel], with the sample dimension folded in. Where heads lie side by side FULL ones come
first, then FORWARD_ONLY.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import ceil

import torch
import triton
from torch import Tensor

from d2ft_hpc.execution import triton_kernels
from d2ft_hpc.execution.accumulation import Accumulator

_COPY_ELEMENTS = 2048
"""Elements that one program copies."""
_MULTIPROCESSORS = 132
"""Multiprocessors of a Hopper GPU, on which the sizes here were the fastest of those tried (analysis/step)."""
_TILE, _COLUMNS = 8, 128
"""Tokens and columns that an element-wise program handles at a time."""
_SUMMED_COLUMNS = 16
"""Columns of partial sums that one program adds up."""
_WHOLE_TOKENS = 2048
"""Tokens times channels, rounded up to a power of two, that a program handles at a time if it needs whole tokens."""


class Way(IntEnum):
    """What the copying kernel writes."""

    TAKE = 0
    """The parts of parameters that some heads own."""
    SPREAD = 1
    """Tensors like the parameters, of such parts, with zeros for other heads."""
    ADD = 2
    """The same, added to what is there."""


@dataclass(frozen=True)
class HeadSlices:
    """A parameter viewed as [outer, head, inner]. rows: taken heads lie in front, [head, outer, inner]; else they stay
    in the middle.

    units: where heads have unequal shares of [outer, unit, inner] instead, in the middle, the number of units
        (`HeadAxis`); each taken head is then filled up with zeros to the largest share, and all together to a multiple
        of 8 units, at which matrix products are fast. 0: equal shares.
    """

    outer: int
    inner: int
    rows: bool
    units: int = 0

    def numbers(self, chosen: int, of: int) -> int:
        """Of `chosen` heads' part."""
        return self.outer * self._rows(chosen, of) * self.inner

    def programs(self, chosen: int, of: int, spreads: bool) -> int:
        """Programs of the kernel that copy the part of `chosen` heads, or spread it over the whole parameter."""
        rows = (self.units or of) if spreads else self._rows(chosen, of)
        tall, wide, by_column = triton_kernels.tile_of(self.outer, self.inner, self.rows, _COPY_ELEMENTS)
        if by_column:
            return ceil(self.outer / tall) * ceil(rows * self.inner / wide)
        return ceil(self.outer * rows / tall) * ceil(self.inner / wide)

    def _rows(self, chosen: int, of: int) -> int:
        return chosen if self.units == 0 else ceil(chosen * ceil(self.units / of) / 8) * 8


def take_heads(
    parameters: Sequence[Tensor],
    slices: Sequence[HeadSlices],
    heads: Tensor,
    of: int,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """The chosen heads' part of the parameters, flat and in `dtype`, or in their own, in one launch of every six.

    heads: int64 [n], the chosen of `of` heads.
    """
    chosen = heads.numel()
    taken = [
        parameter.new_empty(each.numbers(chosen, of), dtype=dtype)
        for parameter, each in zip(parameters, slices, strict=True)
    ]
    _copy_heads(parameters, taken, slices, heads, chosen, of, Way.TAKE)
    return taken


def spread_heads(
    parts: Sequence[Tensor],
    likes: Sequence[Tensor],
    slices: Sequence[HeadSlices],
    places: Tensor,
    chosen: int,
) -> list[Tensor]:
    """The parts of parameters in tensors like `likes`, zeros for all other heads, in one launch of every six.

    places: int64 [head], each head's place among the `chosen` ones; -1 or above them for the others.
    """
    whole = [torch.empty_like(like) for like in likes]
    _copy_heads(parts, whole, slices, places, chosen, places.numel(), Way.SPREAD)
    return whole


def add_heads(
    parts: Sequence[Tensor],
    totals: Sequence[Tensor],
    slices: Sequence[HeadSlices],
    places: Tensor,
    chosen: int,
) -> None:
    """Adds to `totals` what `spread_heads` would return, without a pass over the other heads' numbers."""
    _copy_heads(parts, totals, slices, places, chosen, places.numel(), Way.ADD)


def put_heads(
    parts: Sequence[Tensor],
    likes: Sequence[Tensor],
    accumulators: Sequence[Accumulator | None],
    slices: Sequence[HeadSlices],
    places: Tensor,
    chosen: int,
) -> list[Tensor | None]:
    """`add_heads` for parts that have an accumulator, whose result is None, and `spread_heads` for the others."""
    totals = [None if each is None else each.take() for each in accumulators]
    added = [index for index, total in enumerate(totals) if total is not None]
    spread = [index for index, total in enumerate(totals) if total is None]
    results: list[Tensor | None] = [None] * len(parts)
    if added:
        its_totals = [total for total in totals if total is not None]
        add_heads([parts[i] for i in added], its_totals, [slices[i] for i in added], places, chosen)
    if spread:
        its_likes, its_slices = [likes[i] for i in spread], [slices[i] for i in spread]
        whole = spread_heads([parts[i] for i in spread], its_likes, its_slices, places, chosen)
        for index, tensor in zip(spread, whole, strict=True):
            results[index] = tensor
    return results


def _copy_heads(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    slices: Sequence[HeadSlices],
    index: Tensor,
    chosen: int,
    of: int,
    way: Way,
) -> None:
    if len(sources) > 6:
        _copy_heads(sources[6:], targets[6:], slices[6:], index, chosen, of, way)
        sources, targets, slices = sources[:6], targets[:6], slices[:6]
    pointers, shapes = [], []
    for place in range(6):
        is_used = place < len(sources)
        each = slices[place] if is_used else HeadSlices(0, 1, rows=True)
        pointers += [sources[place], targets[place]] if is_used else [sources[0], targets[0]]
        shapes += [each.outer, each.inner, each.rows, each.units]
    programs = sum(each.programs(chosen, of, way is not Way.TAKE) for each in slices)
    triton_kernels.copy_heads[(programs,)](*pointers, index, chosen, of, *shapes, int(way), _COPY_ELEMENTS)


@dataclass(frozen=True)
class Norm:
    """LayerNorm's weight and bias [channel], and epsilon."""

    weight: Tensor
    bias: Tensor
    epsilon: float


@dataclass(frozen=True)
class Normed:
    """rows: [token, channel]. mean, rstd: fp32 [token], for the backward."""

    rows: Tensor
    mean: Tensor
    rstd: Tensor


def normalise(x: Tensor, norm: Norm, dtype: torch.dtype) -> Normed:
    """LayerNorm of x [token, channel] in `dtype`."""
    normed = _new_normed(x, dtype)
    _add_norm(x, None, None, None, None, normed, norm)
    return normed


def add_branch(x: Tensor, branch: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """x + scale * (branch + bias), in x's type. x, branch: [token, channel]; bias, scale: [channel]."""
    total = torch.empty_like(x)
    _add_norm(x, branch, bias, scale, total, None, None)
    return total


def add_branch_and_normalise(
    x: Tensor, branch: Tensor, bias: Tensor | None, scale: Tensor | None, norm: Norm
) -> tuple[Tensor, Normed]:
    """What `add_branch` gives, and its LayerNorm in the branch's type, in one pass."""
    total, normed = torch.empty_like(x), _new_normed(x, branch.dtype)
    _add_norm(x, branch, bias, scale, total, normed, norm)
    return total, normed


def _new_normed(x: Tensor, dtype: torch.dtype) -> Normed:
    statistics = x.new_empty(2, x.shape[0], dtype=torch.float32)
    return Normed(torch.empty_like(x, dtype=dtype), statistics[0], statistics[1])


def _add_norm(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    total: Tensor | None,
    normed: Normed | None,
    norm: Norm | None,
) -> None:
    tokens, channels = x.shape
    tile, block, warps = _whole_tokens(channels)
    triton_kernels.add_norm[(ceil(tokens / tile),)](
        x,
        *(x if each is None else each for each in (branch, bias, scale, total)),
        *((x, x, x) if normed is None else (normed.rows, normed.mean, normed.rstd)),
        *((x, x) if norm is None else (norm.weight, norm.bias)),
        tokens,
        channels,
        0.0 if norm is None else norm.epsilon,
        branch is not None,
        bias is not None,
        scale is not None,
        norm is not None,
        tile,
        block,
        num_warps=warps,
    )


def norm_backward(
    gradient: Tensor, x: Tensor, normed: Normed, norm: Norm, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of x = what went into `normalise` and past it: `residual` plus what `gradient` gives through the norm.

    gradient, x, residual: [token, channel]. Returns it in x's type, and partial sums [program, 3 x channel]: the norm's
    weight's and bias's gradients, and the returned gradient's sum over tokens.
    """
    tokens, channels = x.shape
    tile, block, warps = _whole_tokens(channels)
    rows, programs = _shares(tokens, 1, tile, at_once=4)
    result = torch.empty_like(x)
    partial = x.new_empty(programs, 3 * channels, dtype=torch.float32)
    triton_kernels.norm_backward[(programs,)](
        gradient,
        x,
        residual,
        result,
        normed.mean,
        normed.rstd,
        norm.weight,
        partial,
        tokens,
        channels,
        rows,
        tile,
        block,
        num_warps=warps,
    )
    return result, partial


def branch_backward(
    gradient: Tensor, branch: Tensor | None, bias: Tensor | None, scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of `add_branch`: of the branch [token, channel] in `dtype`; of bias and scale, as partial sums
    [program, 2 x channel].

    gradient: of the sum. branch: read where there is a scale. Without one, and in the same type, the branch's gradient
    is `gradient` itself.
    """
    tokens, channels = gradient.shape
    tile, block = 32, 64  # it reads little more than it sums
    columns = ceil(channels / block)
    rows, programs = _shares(tokens, columns, tile, at_once=8)
    writes = scale is not None or gradient.dtype != dtype
    result = torch.empty_like(gradient, dtype=dtype) if writes else gradient
    partial = gradient.new_empty(programs, 2 * channels, dtype=torch.float32)
    triton_kernels.branch_backward[(columns, programs)](
        gradient,
        *(gradient if each is None else each for each in (branch, bias, scale)),
        result,
        partial,
        tokens,
        channels,
        rows,
        writes,
        bias is not None,
        scale is not None,
        tile,
        block,
        num_warps=2,
    )
    return result, partial


def gelu_join(first: Tensor, second: Tensor | None) -> Tensor:
    """GELU (erf) of two tensors side by side. first, second: [token, width1], [token, width2]."""
    tokens, width1 = first.shape
    width2 = 0 if second is None else second.shape[1]
    joined = first.new_empty(tokens, width1 + width2)
    columns = ceil(width1 / 256) + ceil(width2 / 256)
    triton_kernels.gelu_join[(columns, ceil(tokens / _TILE))](
        first, first if second is None else second, joined, tokens, width1, width2, _TILE, 256
    )
    return joined


def gelu_backward(gradient: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Through GELU (erf) of `hidden` [token, width]: the gradient of `hidden`, GELU of it again, and partial sums
    [program, width] of that gradient."""
    tokens, width = hidden.shape
    columns = ceil(width / _COLUMNS)
    rows, programs = _shares(tokens, columns, _TILE, at_once=32)
    of_hidden, activated = torch.empty_like(hidden), torch.empty_like(hidden)
    partial = hidden.new_empty(programs, width, dtype=torch.float32)
    triton_kernels.gelu_backward[(columns, programs)](
        gradient, hidden, of_hidden, activated, partial, tokens, width, rows, _TILE, _COLUMNS
    )
    return of_hidden, activated, partial


def join_heads(first: Tensor, second: Tensor | None) -> Tensor:
    """Attention outputs [sample, head, token, channel] as rows [token, channel of all heads], first's heads first.

    A view of `first` where that is possible.
    """
    first, second = _with_unit_stride(first), None if second is None else _with_unit_stride(second)
    samples, heads1, tokens, size = first.shape
    if second is None and first.transpose(1, 2).is_contiguous():
        return first.transpose(1, 2).reshape(samples * tokens, heads1 * size)
    beside, heads2 = (first, 0) if second is None else (second, second.shape[1])
    joined = first.new_empty(samples * tokens, (heads1 + heads2) * size)
    triton_kernels.join_heads[(ceil(joined.shape[1] / _COLUMNS), ceil(samples * tokens / _TILE))](
        first,
        beside,
        joined,
        tokens,
        samples * tokens,
        heads1 * size,
        heads2 * size,
        *first.stride()[:3:2],
        *beside.stride()[:3:2],
        first.stride(1),
        beside.stride(1),
        size,
        _TILE,
        _COLUMNS,
    )
    return joined


def join_qkv(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of q, k, v, each [sample, head, token, channel], as rows [token, head x (q, k, v) x channel] in
    `dtype`, and partial sums of them."""
    query, key, value = map(_with_unit_stride, (query, key, value))
    samples, heads, tokens, size = query.shape
    width = 3 * heads * size
    tile, block = 16, 64
    columns = ceil(width / block)
    rows, programs = _shares(samples * tokens, columns, tile, at_once=16)
    joined = query.new_empty(samples * tokens, width, dtype=dtype)
    partial = query.new_empty(programs, width, dtype=torch.float32)
    triton_kernels.join_qkv[(columns, programs)](
        query,
        key,
        value,
        joined,
        partial,
        tokens,
        samples * tokens,
        width,
        rows,
        *query.stride()[:3:2],
        *key.stride()[:3:2],
        *value.stride()[:3:2],
        query.stride(1),
        key.stride(1),
        value.stride(1),
        size,
        tile,
        block,
    )
    return joined, partial


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def sum_partials(partials: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Sums of up to four partial sums fp32 [program, width] over programs, [width] each, in one launch."""
    results = [
        partial.new_empty(partial.shape[1], dtype=dtype)
        for partial, dtype in zip(partials, dtypes, strict=True)
    ]
    pointers: list[Tensor] = []
    shapes: list[int] = []
    for place in range(4):
        is_used = place < len(partials)
        pointers += [partials[place], results[place]] if is_used else [partials[0], results[0]]
        shapes += partials[place].shape if is_used else (0, 0)
    programs = sum(ceil(each.numel() / _SUMMED_COLUMNS) for each in results)
    triton_kernels.sum_rows[(programs,)](*pointers, *shapes, 64, _SUMMED_COLUMNS)
    return results


def _shares(tokens: int, columns: int, tile: int, at_once: int) -> tuple[int, int]:
    """Tokens that each program sums, in steps of `tile`, and programs for each column; in total `at_once` for each
    multiprocessor."""
    rows = ceil(ceil(tokens * columns / (at_once * _MULTIPROCESSORS)) / tile) * tile
    return rows, ceil(tokens / rows)


def _whole_tokens(channels: int) -> tuple[int, int, int]:
    """Tokens at a time, channels rounded up to a power of two, and warps, of a program that needs whole tokens."""
    block = triton.next_power_of_2(channels)
    return max(1, _WHOLE_TOKENS // block), block, min(max(1, block // 256), 16)
