"""When a pass through a model's blocks runs as CUDA graphs, and of which shape."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from d2ft_hpc.execution.block import BlockHeads
from d2ft_hpc.execution.block_graphs import BlockGraphs, Link, Links, Pass
from d2ft_hpc.execution.compilation import cannot_compile
from d2ft_hpc.execution.gradients import Owners
from d2ft_hpc.execution.rows import Row

RunBlock = Callable[[int, BlockHeads | None, Tensor, Any, Any], Tensor]
"""Runs the block of that index with these heads; None: all of them. Then x, and other arguments of its forward."""


class GraphReplay:
    """The graphs of one model's blocks, and the pass through them that is under way."""

    def __init__(self, recomputes: Callable[[], bool]) -> None:
        """recomputes: whether blocks run again in the backward; then they do not run as graphs."""
        self.graphs = BlockGraphs()
        self.captures = False
        """Whether a block is being captured."""
        self._recomputes = recomputes
        self._pass: Pass | None = None  # while its forward is under way
        self._beside: list[Any] = []  # what the first block of the pass got beside x
        self._differ = False  # blocks get other tensors beside x than the first
        self._row: Row | None = None
        self._chain: list[int] | None = None  # the blocks that run under it, in order

    def run(
        self,
        index: int,
        x: Tensor,
        arguments: tuple[Any, Any],
        row: Row | None,
        blocks: Collection[int],
        owners_of: Callable[[int], Owners],
        at_one_point: Callable[[int], bool],
        run_block: RunBlock,
    ) -> Tensor | None:
        """Block `index` under `row`, or densely; None where it has to run without graphs.

        arguments: of the block's forward beside x, positional ones and those by keyword. Graphs read their tensors, of
        which none may take a gradient and all blocks of a pass have to get the same. Of the block of an index:
        owners_of: of all its parameters; at_one_point: whether their gradients come at one point of the backward.
        """
        if self._chain is None or row is not self._row:
            self._row = row
            self._chain = sorted(blocks) if row is None else [each for each in row.active if each in blocks]
        chain = self._chain
        if index not in chain:
            return None
        beside, tree = tree_flatten(arguments) if any(arguments) else ([], None)
        if index == chain[0]:
            self._pass, self._beside = None, beside
            can_run = x.is_cuda and torch.is_grad_enabled() and not (cannot_compile() or self._recomputes())
            if can_run and not self._differ and all(map(_is_readable, beside)):
                zeros = [at_one_point(each) for each in chain]
                key = (
                    *(x.shape, x.dtype, x.requires_grad, None if row is None else row.shape, *zeros),
                    *(torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
                    *(str(tree), *map(_kind, beside)),
                )

                def links(read: Sequence[Tensor]) -> Links:
                    tensors = iter(read)
                    own = [next(tensors) if isinstance(each, Tensor) else each for each in beside]
                    given = arguments if tree is None else tree_unflatten(own, tree)
                    compute = partial(self._capture, row, run_block, given)
                    return {
                        each: Link(partial(compute, each), owners_of(each), gives_zeros)
                        for each, gives_zeros in zip(chain, zeros, strict=True)
                    }

                tensors = [each for each in beside if isinstance(each, Tensor)]
                self._pass = self.graphs.begin(key, x, None if row is None else row.indices, tensors, links)
        elif self._pass is not None and not _are_same(beside, self._beside):
            self._pass, self._differ = None, True
        result = None if self._pass is None else self._pass.run(index, x)
        if result is None or index == chain[-1]:
            self._pass, self._beside = None, []
        return result

    def _capture(
        self,
        row: Row | None,
        run_block: RunBlock,
        arguments: tuple[Any, Any],
        index: int,
        x: Tensor,
        indices: Tensor | None,
    ) -> Tensor:
        heads = None if row is None or indices is None else row.reading(indices).heads[index]
        self.captures = True
        try:
            return run_block(index, heads, x, *arguments)
        finally:
            self.captures = False


def _is_readable(argument: Any) -> bool:
    """Whether graphs can run with an argument: one that they read where it was copied to, or that is in their key."""
    if isinstance(argument, Tensor):
        return argument.is_cuda and not argument.requires_grad
    return isinstance(argument, bool | int | float | str | None)


def _kind(argument: Any) -> Any:
    """What of an argument graphs are made for."""
    return (argument.shape, argument.dtype) if isinstance(argument, Tensor) else argument


def _are_same(arguments: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(arguments) == len(others) and all(
        one is other if isinstance(one, Tensor) or isinstance(other, Tensor) else one == other
        for one, other in zip(arguments, others, strict=True)
    )
