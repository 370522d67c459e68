"""Memory that this rank uses, and what is left for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def reset_peak(device: torch.device) -> None:
    """Begin a new peak of the GPU's allocated memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def release_unused(device: torch.device) -> None:
    """Returns GPU memory that torch keeps after passes, since NCCL and other libraries need memory beside it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def used_bytes(device: torch.device) -> float:
    """GPU: most memory allocated since `reset_peak`. CPU: this process's resident memory now; NaN if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/statm", "rb") as file:
            return float(int(file.read().split()[1]) * _PAGE_BYTES)
    except OSError:
        return float("nan")


def free_bytes(device: torch.device) -> float:
    """GPU: what the driver and torch's allocator have left. CPU: what the host has left for all of its processes, or
    less if this process's memory cgroups have limits; NaN if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    return free_bytes_of_host(Path("/"))


def free_bytes_of_host(root: Path) -> float:
    """`free_bytes` of a CPU. root: where /proc and /sys are."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("nan")
    return min([free, *_left_in_cgroups(root)])


def _left_in_cgroups(root: Path) -> Iterator[float]:
    """What is left in this process's memory cgroup and in those above it that have limits. Cached files that nobody
    used lately count as free, as in MemAvailable."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used, files = "", "memory.max", "memory.current", "inactive_file "
        elif "memory" in controllers.split(","):
            top, limit, used, files = (
                "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ",
            )  # fmt: skip
        else:
            continue
        mount = root / "sys/fs/cgroup" / top
        folder = mount / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group == mount.parent:
                break
            with suppress(OSError, ValueError):  # the root has no files, and "max" is no limit
                statistics = (group / "memory.stat").read_text().splitlines()
                cached = next((int(row.split()[1]) for row in statistics if row.startswith(files)), 0)
                yield float(int((group / limit).read_text()) - int((group / used).read_text()) + cached)


def kept_bytes(forward: Callable[[], Tensor], beside: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of `forward`'s result, without those of the tensors `beside`."""
    own = {tensor.untyped_storage().data_ptr() for tensor in beside}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operation that kept its own output would keep itself alive for good

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # kept alive until everything is counted, since freed memory is used again
    del result
    return sum(kept.values())
