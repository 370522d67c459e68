"""The control plane: small messages between all ranks, each with a deadline. Its interface, and that of one process.

Tensors never travel here. Payloads are plain bytes, never pickles. Every collective begins with a barrier, so
that rank 0 names the ranks that do not come before any data moves. The other ranks are a little more patient
than rank 0 (`GRACE_SECONDS`): by the time that they would complain, its message has been seen and the
launcher has ended the job.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from d2ft_hpc.launch.async_gather import DoneGather, PendingGather
from d2ft_hpc.safe_text import one_line, scrubbed

GRACE_SECONDS = 3.0


class Control(Protocol):
    """Every rank calls the same methods in the same order. A missed deadline or a lost rank is a
    LostRankError, after which only `abort` is of use."""

    rank: int
    local_rank: int
    world_size: int
    host: str
    hosts: tuple[str, ...]
    """The host of each rank, [world_size]."""
    timeout_seconds: float
    """Deadline of `broadcast` and `all_gather`."""

    def broadcast(self, payload: bytes | None) -> bytes:
        """Return the payload of rank 0 on every rank; that of the others is not looked at."""

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Return the payload of each rank, in rank order; lengths may differ."""

    def start_gather(self, payload: bytes) -> PendingGather:
        """Begin to gather payloads of one length at rank 0, without waiting for any rank. Gathers end in the order
        in which they were started."""

    def barrier(self, timeout_seconds: float) -> None:
        """Wait until every rank is here."""

    def abort(self, message: str, status: int = 1) -> NoReturn:
        """Print one line and end all ranks at once with a non-zero status, which launchers may replace by another."""

    def close(self) -> None:
        """End MPI and torch.distributed where `connect` started them; every rank must call it. Idempotent."""


def describe_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Name some of the ranks: "all ranks", "rank 2 on nodeB" or "ranks 0-3, 6 on nodeA, rank 8 on nodeB"."""
    if len(ranks) == len(hosts) > 1:
        return "all ranks"
    by_host: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        by_host.setdefault(hosts[rank], []).append(rank)
    return ", ".join(
        f"rank{'s' if len(members) > 1 else ''} {_ranges(members)} on {host}"
        for host, members in by_host.items()
    )


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def print_line(text: str) -> None:
    """Write one line to stderr in one piece, after what this process wrote before it, as `safe_text` makes it safe."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, (scrubbed(one_line(text)) + "\n").encode(errors="replace"))


class SoloControl:
    """The control plane of a single process."""

    def __init__(self) -> None:
        self.rank = 0
        self.local_rank = 0
        self.world_size = 1
        self.host = socket.gethostname()
        self.hosts: tuple[str, ...] = (self.host,)
        self.timeout_seconds = float("inf")
        self.owns_process_group = False

    def broadcast(self, payload: bytes | None) -> bytes:
        return payload or b""

    def all_gather(self, payload: bytes) -> list[bytes]:
        return [payload]

    def start_gather(self, payload: bytes) -> PendingGather:
        return DoneGather(payload)

    def barrier(self, timeout_seconds: float) -> None:
        pass

    def abort(self, message: str, status: int = 1) -> NoReturn:
        print_line(f"[rank 0 on {self.host}] {message}")
        sys.exit(status)

    def close(self) -> None:
        if self.owns_process_group:
            self.owns_process_group = False
            destroy_process_group()


def gathered(control: Control, value: Any) -> list[Any]:
    """Every rank's value, in rank order: what JSON can hold, NaN and infinity too. All ranks call it together."""
    return [json.loads(part) for part in control.all_gather(json.dumps(value).encode())]


def destroy_process_group() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
