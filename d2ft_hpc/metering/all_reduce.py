"""How long an all-reduce over all ranks takes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

_REPEATS = 5
_SMALL_NUMBERS, _LARGE_NUMBERS = 16, 1 << 20  # float32 numbers of the two that are timed


@dataclass(frozen=True)
class AllReduceSeconds:
    """Seconds. latency: of an all-reduce of almost nothing. per_byte: that every further byte takes."""

    latency: float
    per_byte: float


def measure_all_reduce(device: torch.device) -> AllReduceSeconds:
    """Times all-reduces over all ranks, which call it together. Zeros where torch.distributed is not in use."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return AllReduceSeconds(0.0, 0.0)
    small, large = (fastest_all_reduce(numbers, device) for numbers in (_SMALL_NUMBERS, _LARGE_NUMBERS))
    return AllReduceSeconds(small, max(large - small, 0.0) / (4 * (_LARGE_NUMBERS - _SMALL_NUMBERS)))


def fastest_all_reduce(numbers: int, device: torch.device) -> float:
    """Seconds of the fastest of some all-reduces of float32 numbers after a first one; all ranks call it together."""
    buffer = torch.zeros(numbers, device=device)
    seconds = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        torch.distributed.all_reduce(buffer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
