"""The control plane over gloo, for launchers that start no MPI."""

from __future__ import annotations

import os
import re
import socket
import time
from datetime import timedelta
from typing import Any, NoReturn

from d2ft_hpc.errors import LostRankError
from d2ft_hpc.launch.async_gather import GlooGather, PendingGather
from d2ft_hpc.launch.control import (
    GRACE_SECONDS,
    describe_ranks,
    destroy_process_group,
    print_line,
)


class GlooControl:
    """The control plane over a gloo group of its own, for launchers that start no MPI.

    `timeout_seconds` is the deadline of `broadcast` and `all_gather`. torch.distributed must be initialized.
    """

    def __init__(self, local_rank: int, *, timeout_seconds: float, owns_process_group: bool) -> None:
        from torch import distributed

        timeout = timedelta(seconds=timeout_seconds)
        self._group: Any = distributed.new_group(backend="gloo", timeout=timeout)
        self.timeout_seconds = timeout_seconds
        # No deadline for gathers: the ranks may be a whole step apart.
        self._gathering: Any = distributed.new_group(backend="gloo", timeout=timedelta(days=1))
        self.owns_process_group = owns_process_group
        self.rank = distributed.get_rank()
        self.local_rank = local_rank
        self.world_size = distributed.get_world_size()
        self.host = socket.gethostname()
        self.hosts: tuple[str, ...] = ("an unknown host",) * self.world_size
        self.hosts = tuple(host.decode() for host in self.all_gather(self.host.encode()))

    def broadcast(self, payload: bytes | None) -> bytes:
        from d2ft_hpc.launch.byte_collectives import broadcast_bytes

        self.barrier(self.timeout_seconds)
        try:
            return broadcast_bytes(payload or b"", self._group)
        except RuntimeError as error:
            self._lost("a rank", error)

    def all_gather(self, payload: bytes) -> list[bytes]:
        from d2ft_hpc.launch.byte_collectives import all_gather_bytes

        self.barrier(self.timeout_seconds)
        try:
            return all_gather_bytes(payload, self._group)
        except RuntimeError as error:
            self._lost("a rank", error)

    def start_gather(self, payload: bytes) -> PendingGather:
        return GlooGather(self._gathering, payload)

    def barrier(self, timeout_seconds: float) -> None:
        from torch import distributed

        patience = timeout_seconds if self.rank == 0 else timeout_seconds + GRACE_SECONDS
        started = time.monotonic()
        try:
            distributed.monitored_barrier(self._group, timedelta(seconds=patience), wait_all_ranks=True)
        except RuntimeError as error:
            # Rank 0's error names the ranks, and comes at once when a connection breaks.
            found = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
            ranks = [int(number) for number in found[1].split(",")] if found else [0]
            missing = describe_ranks(ranks, self.hosts)
            if time.monotonic() - started < timeout_seconds:
                self._lost(missing, error)
            raise LostRankError(
                f"{missing} did not come to a barrier within {timeout_seconds:g} s"
            ) from error

    def abort(self, message: str, status: int = 1) -> NoReturn:
        # Closed connections wake the ranks that wait for this one; launchers end the others.
        print_line(f"[rank {self.rank} on {self.host}] {message}")
        os._exit(status)

    def close(self) -> None:
        if self.owns_process_group:
            self.owns_process_group = False
            self.barrier(self.timeout_seconds)
            destroy_process_group()

    def _lost(self, whom: str, error: Exception) -> NoReturn:
        time.sleep(GRACE_SECONDS)  # the rank that failed knows why: let its message come first
        raise LostRankError(f"lost the connection to {whom}: it ended or cannot be reached") from error
