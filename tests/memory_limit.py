"""A processor that runs out of memory as a full GPU does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def activation_limit(limit_bytes: float) -> Iterator[None]:
    """Inside, autograd may keep so many bytes for one backward at a time; beyond them it raises OutOfMemoryError, as a
    full GPU does. For processors, whose memory has no end that could be told from that of the machine."""
    kept = 0

    def pack(tensor: Tensor) -> _Kept:
        nonlocal kept
        wanted = kept + tensor.nbytes
        if wanted > limit_bytes:
            raise torch.OutOfMemoryError(f"activations of {wanted} bytes, allowed are {limit_bytes:.0f}")
        kept = wanted
        return _Kept(
            tensor.detach(), free
        )  # an operation's own output would keep the operation, and so itself

    def free(size: int) -> None:
        nonlocal kept
        kept -= size

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        yield


class _Kept:
    """A tensor that autograd keeps; gone with the graph."""

    def __init__(self, tensor: Tensor, free: Callable[[int], None]) -> None:
        self.tensor, self._free = tensor, free

    def __del__(self) -> None:
        self._free(self.tensor.nbytes)
