"""The control plane of a loop whose process group is the user's own."""

from __future__ import annotations

import socket
import sys
from typing import NoReturn

import torch.distributed as dist

from d2ft_hpc.launch import Control
from d2ft_hpc.launch.async_gather import DoneGather, PendingGather
from d2ft_hpc.launch.byte_collectives import all_gather_bytes, broadcast_bytes
from d2ft_hpc.launch.control import SoloControl


def control_of_loop() -> Control:
    """The control plane over torch.distributed's default group if there is one, else of this process alone."""
    return DefaultGroupControl() if dist.is_initialized() and dist.get_world_size() > 1 else SoloControl()


class DefaultGroupControl:
    """Exchanges bytes in torch.distributed's default process group, whose deadlines hold; it makes no group of its own,
    which would outlive the user's."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_rank = self.rank
        self.timeout_seconds = float("inf")
        self.host = socket.gethostname()
        self.hosts = tuple(host.decode() for host in self.all_gather(self.host.encode()))

    def broadcast(self, payload: bytes | None) -> bytes:
        return broadcast_bytes(payload or b"", device=self._device)

    def all_gather(self, payload: bytes) -> list[bytes]:
        return all_gather_bytes(payload, device=self._device)

    def start_gather(self, payload: bytes) -> PendingGather:
        every = self.all_gather(payload)
        return DoneGather(b"".join(every) if self.rank == 0 else b"")

    def barrier(self, timeout_seconds: float) -> None:
        dist.barrier()

    def abort(self, message: str, status: int = 1) -> NoReturn:
        sys.exit(f"d2ft: [rank {self.rank} on {self.host}] {message}")

    def close(self) -> None:
        """The group is the user's."""

    @property
    def _device(self) -> str:
        """On which the group takes tensors: the CPU, if it takes them there."""
        backend = str(dist.get_backend_config())
        return "cpu" if "gloo" in backend or "mpi" in backend else "cuda"
