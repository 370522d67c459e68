"""Runs a block with the heads of its row: as its library does, by our kernels, or by torch, compiled or not."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from d2ft_hpc.execution.block import BlockHeads, PartAxes, run_block
from d2ft_hpc.execution.compilation import cannot_compile
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.execution.narrow import take_parts
from d2ft_hpc.execution.rows import Row
from d2ft_hpc.families.family import KernelParts
from d2ft_hpc.model.subnets import SubnetMap

MOST_SHAPES = 8
"""Kernels that torch.compile keeps for one function, by default, and CUDA graphs that we keep of micro-batches."""


class BlockRunner:
    """How the blocks of one model run."""

    def __init__(self, subnets: SubnetMap, compile: bool) -> None:
        self._subnets = subnets
        self.shapes = 0
        """`PlanExecutor.block_shapes`."""
        self._kernel_parts: dict[int, KernelParts | None] = {}
        self._compiled_shapes: set[Hashable] = set()
        self._largest_input: dict[int, int] = {}  # numbers in what blocks that skip heads got, by tokens
        # Each shape is compiled for itself: kernels for shapes that may vary are slower.
        self._compiled = torch.compile(_dense_forward, dynamic=False) if compile else None
        self._compiled_heads = torch.compile(run_block, dynamic=False) if compile else None
        self._compiled_attend = torch.compile(_attend, dynamic=False) if compile else None

    @property
    def compiles(self) -> bool:
        """Whether torch.compile makes kernels of blocks."""
        return self._compiled is not None

    def forget_parts(self) -> None:
        """Blocks may have got other modules since they ran last."""
        self._kernel_parts.clear()

    def run(
        self,
        block: nn.Module,
        index: int,
        heads: BlockHeads | None,
        for_kernels: Callable[[nn.Module, int], tuple[KernelParts | None, bool]],
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Block `index` with these heads; None: all of them. for_kernels: gives `following` and `keeps` of `run_fused`
        for a block and its index."""
        if heads is None or heads.is_dense:
            return self._run_dense(block, x, *args, **kwargs)
        subnets = self._subnets
        subnets.family.require_skippable(block, kwargs)
        if heads.is_shortcut:
            return x
        following, keeps = for_kernels(block, index) if has_kernels(x) else (None, False)
        if x.is_cuda and (parts := self.fused_parts(block, index, heads)) is not None:
            if self._compiled_attend is not None and not parts.is_plain and self._compiles(x):
                parts = replace(parts, attend=partial(self._compiled_attend, parts.attend))
            result: Tensor = _fused().run_fused(parts, x, heads, following, keeps, *args, **kwargs)
            return result
        run = run_block if self._compiled_heads is None or not self._compiles(x) else self._compiled_heads
        takes = keeps and not torch.compiler.is_compiling()

        def forward(x: Tensor) -> Tensor:
            axes = PartAxes(subnets.part_axes[index])
            if takes:
                axes = take_parts(block, heads, axes.full, x.device.type)
            result: Tensor = run(subnets.family, block, x, heads, axes, *args, **kwargs)
            return result

        return subnets.family.run(block, forward, x)

    def fused_parts(self, block: nn.Module, index: int, heads: BlockHeads) -> KernelParts | None:
        """What our own kernels take of block `index`, if they run it on a GPU."""
        if not heads.trains or heads.is_dense or _fused() is None:
            return None
        if index not in self._kernel_parts:
            self._kernel_parts[index] = self._subnets.family.kernel_parts(block)
        return self._kernel_parts[index]

    def count_shapes(
        self,
        rows: Sequence[Row],
        blocks: Mapping[int, nn.Module],
        device: torch.device,
        reduction: Reduction,
        passes_below: bool,
    ) -> None:
        """Makes `shapes` those with these rows added; they count from now on if kernels for them will be made.

        passes_below: whether a gradient goes on below the blocks, whatever the rows.
        """
        shapes = set(self._compiled_shapes)
        for slot, row in enumerate(rows):
            for reduces in reduction.may_happen_in(slot, len(rows)):
                takes_gradient = passes_below
                for index, (heads, is_sparse) in enumerate(zip(row.heads, row.sparse, strict=True)):
                    at_one_point = is_sparse and reduces
                    if index in blocks and self._is_compiled(blocks[index], index, heads, device):
                        rates = self._subnets.family.drops(blocks[index]).rates_by_sample
                        shapes.add((row.grid, heads.shape, takes_gradient, at_one_point, rates))
                    takes_gradient |= heads.trains or at_one_point
        if len(shapes) <= MOST_SHAPES:
            self._compiled_shapes = shapes
        self.shapes = len(shapes)

    def _is_compiled(self, block: nn.Module, index: int, heads: BlockHeads, device: torch.device) -> bool:
        """Whether torch.compile may make kernels of the block, which skips heads, or of its attention."""
        if heads.is_dense or heads.is_shortcut:
            return False
        parts = self.fused_parts(block, index, heads) if device.type == "cuda" else None
        return parts is None or not parts.is_plain

    def _compiles(self, x: Tensor) -> bool:
        """Whether blocks that skip heads run through torch.compile on this input.

        Inputs smaller than before, as at the end of an epoch, do not: making their kernels would take longer than
        these save.
        """
        if self.shapes > MOST_SHAPES or cannot_compile():
            return False
        largest = self._largest_input[x.shape[1]] = max(self._largest_input.get(x.shape[1], 0), x.numel())
        return x.numel() == largest

    def _run_dense(self, block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._compiled is None or cannot_compile():
            return _dense_forward(block, x, *args, **kwargs)
        result: Tensor = self._compiled(block, x, *args, **kwargs)
        return result


def has_kernels(x: Tensor) -> bool:
    """Whether our own kernels run on the device of `x`."""
    return x.is_cuda and _fused() is not None


@cache
def _fused() -> Any:
    """The module of fused blocks; None where Triton is not installed."""
    try:
        from d2ft_hpc.execution import fused
    except ImportError:
        return None
    return fused


def _attend(attend: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """What `KernelParts.attend` computes; one function for all blocks, whose kernels are the same."""
    return attend(*args, **kwargs)


def _dense_forward(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = type(block).forward(block, x, *args, **kwargs)
    return result
