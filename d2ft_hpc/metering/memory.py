"""Memory that this rank uses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def reset_peak(device: torch.device) -> None:
    """Begin a new peak of the GPU's allocated memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def used_bytes(device: torch.device) -> float:
    """GPU: most memory allocated since `reset_peak`. CPU: what of this process is resident now; NaN if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/statm", "rb") as file:
            return float(int(file.read().split()[1]) * _PAGE_BYTES)
    except OSError:
        return float("nan")


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
