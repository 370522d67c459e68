"""The control plane of a loop whose process group is the user's own."""

from __future__ import annotations

import socket
import sys
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from d2ft_hpc.launch import Control
from d2ft_hpc.launch.async_gather import PendingGather
from d2ft_hpc.launch.control import SoloControl


def control_of_loop() -> Control:
    """Over torch.distributed's default group if there is one, else of this process alone."""
    return DefaultGroupControl() if dist.is_initialized() and dist.get_world_size() > 1 else SoloControl()


class DefaultGroupControl:
    """Exchanges bytes in torch.distributed's default process group, whose deadlines hold; it makes no group of its own,
    which would outlive the user's."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_rank = self.rank
        self.timeout_seconds = float("inf")
        self.host = socket.gethostname()
        self.hosts: tuple[str, ...] = ("an unknown host",) * self.world_size
        self.hosts = tuple(host.decode() for host in self.all_gather(self.host.encode()))

    def broadcast(self, payload: bytes | None, root: int = 0) -> bytes:
        size = torch.tensor([len(payload or b"")], device=self._device)
        dist.broadcast(size, root)
        content = self._padded(payload if self.rank == root and payload else b"", int(size))
        dist.broadcast(content, root)
        return _bytes(content, int(size))

    def all_gather(self, payload: bytes) -> list[bytes]:
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(payload)], device=self._device))
        longest = max(int(size) for size in sizes)
        own = self._padded(payload, longest)
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own)
        return [_bytes(part, int(size)) for part, size in zip(parts, sizes, strict=True)]

    def start_gather(self, payload: bytes) -> PendingGather:
        return _Gathered(self.all_gather(payload))

    def barrier(self, timeout_seconds: float) -> None:
        dist.barrier()

    def abort(self, message: str, status: int = 1) -> NoReturn:
        sys.exit(f"d2ft: [rank {self.rank} on {self.host}] {message}")

    def close(self) -> None:
        """The group is the user's."""

    @property
    def _device(self) -> torch.device:
        """On which the group takes tensors: the CPU, if it takes them there."""
        backend = str(dist.get_backend_config())
        return torch.device("cpu" if "gloo" in backend or "mpi" in backend else "cuda")

    def _padded(self, content: bytes, size: int) -> Tensor:
        buffer = torch.zeros(max(size, 1), dtype=torch.uint8)
        if content:
            buffer[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return buffer.to(self._device)


class _Gathered:
    def __init__(self, parts: list[bytes]) -> None:
        self._parts = parts

    def poll(self) -> list[bytes]:
        return self._parts


def _bytes(content: Tensor, size: int) -> bytes:
    return content[:size].cpu().numpy().tobytes()
