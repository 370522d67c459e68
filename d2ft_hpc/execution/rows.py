"""A plan's rows as blocks look them up: which heads each block runs, as index tensors on the model's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from d2ft_hpc.execution.block import BlockHeads
from d2ft_hpc.planning.plan import Grid, Operation


@dataclass(frozen=True)
class Row:
    """What one micro-batch runs. indices: int64 [n], one tensor that the heads of all blocks are parts of. heads:
    [block]. is_complete: FULL everywhere. sparse: [block], whether replicas may have other gradients of the block, or
    in another order. grid: patches of the images, down and across; None: as they come.
    """

    indices: Tensor
    heads: Sequence[BlockHeads]
    is_complete: bool
    sparse: Sequence[bool]
    grid: Grid | None = None

    @property
    def shape(self) -> tuple[Grid | None, tuple[tuple[int, int], ...]]:
        """The grid of the images, and the shape of every block."""
        return self.grid, tuple(heads.shape for heads in self.heads)

    @cached_property
    def active(self) -> list[int]:
        """The blocks that are not SHORTCUT in all heads."""
        return [index for index, heads in enumerate(self.heads) if not heads.is_shortcut]

    def reading(self, indices: Tensor) -> Row:
        """The same numbers of heads, but those of `indices`."""
        sizes = [size for heads in self.heads for size in (heads.order.numel(), heads.places.numel())]
        parts = iter(indices.split(sizes))
        return replace(
            self,
            indices=indices,
            heads=[replace(heads, order=next(parts), places=next(parts)) for heads in self.heads],
        )


def choose_heads(operations: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, list[BlockHeads]]:
    """Indices and heads of a `Row`. operations: of each block, uint8 [head]."""
    chosen = []
    for cells in operations:
        full, forward_only = (
            np.flatnonzero(cells == operation) for operation in (Operation.FULL, Operation.FORWARD_ONLY)
        )
        places = np.full(cells.size, -1)
        places[full] = np.arange(full.size)
        chosen.append((np.concatenate([full, forward_only]), full.size, places))
    # One tensor, so that it reaches a GPU, or the input of a CUDA graph, by one copy.
    joined = np.concatenate(list(chain.from_iterable((order, places) for order, _, places in chosen)))
    indices = torch.from_numpy(joined).to(device)
    parts = iter(indices.split([size for order, _, places in chosen for size in (order.size, places.size)]))
    return indices, [BlockHeads(next(parts), num_full, next(parts)) for _, num_full, _ in chosen]
