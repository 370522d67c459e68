"""Memory that this rank uses."""

from __future__ import annotations

import os

import torch

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
