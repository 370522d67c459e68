"""When a pass through a model's blocks runs as CUDA graphs, and of which shape."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor

from d2ft_hpc.execution.block import BlockHeads
from d2ft_hpc.execution.block_graphs import BlockGraphs, Link, Links, Pass
from d2ft_hpc.execution.compilation import cannot_compile
from d2ft_hpc.execution.gradients import Owners
from d2ft_hpc.execution.rows import Row

RunBlock = Callable[[int, BlockHeads | None, Tensor], Tensor]
"""Runs the block of that index with these heads; None: all of them."""


class GraphReplay:
    """The graphs of one model's blocks, and the pass through them that is under way."""

    def __init__(self, recomputes: Callable[[], bool]) -> None:
        """recomputes: whether blocks run again in the backward; then they do not run as graphs."""
        self.graphs = BlockGraphs()
        self.captures = False
        """Whether a block is being captured."""
        self._recomputes = recomputes
        self._pass: Pass | None = None  # while its forward is under way
        self._row: Row | None = None
        self._chain: list[int] | None = None  # the blocks that run under it, in order

    def run(
        self,
        index: int,
        x: Tensor,
        row: Row | None,
        blocks: Collection[int],
        owners_of: Callable[[int], Owners],
        at_one_point: Callable[[int], bool],
        run_block: RunBlock,
    ) -> Tensor | None:
        """Block `index` under `row`, or densely; None where it has to run without graphs.

        Of the block of an index: owners_of: of all its parameters; at_one_point: whether their gradients come at one
        point of the backward.
        """
        if self._chain is None or row is not self._row:
            self._row = row
            self._chain = sorted(blocks) if row is None else [each for each in row.active if each in blocks]
        chain = self._chain
        if index not in chain:
            return None
        if index == chain[0]:
            self._pass = None
            if x.is_cuda and torch.is_grad_enabled() and not (cannot_compile() or self._recomputes()):
                zeros = [at_one_point(each) for each in chain]
                key = (
                    *(x.shape, x.dtype, x.requires_grad, None if row is None else row.shape, *zeros),
                    *(torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
                )

                def links() -> Links:
                    compute = partial(self._capture, row, run_block)
                    return {
                        each: Link(partial(compute, each), owners_of(each), gives_zeros)
                        for each, gives_zeros in zip(chain, zeros, strict=True)
                    }

                self._pass = self.graphs.begin(key, x, None if row is None else row.indices, links)
        result = None if self._pass is None else self._pass.run(index, x)
        if result is None or index == chain[-1]:
            self._pass = None
        return result

    def _capture(
        self, row: Row | None, run_block: RunBlock, index: int, x: Tensor, indices: Tensor | None
    ) -> Tensor:
        heads = None if row is None or indices is None else row.reading(indices).heads[index]
        self.captures = True
        try:
            return run_block(index, heads, x)
        finally:
            self.captures = False
