"""Gathering payloads at rank 0 while all ranks go on with their work."""

from __future__ import annotations

import time
from typing import Any, Protocol

from d2ft_hpc.errors import LostRankError


class PendingGather(Protocol):
    """A gather that was started on all ranks. Whoever started it polls it until it is done."""

    def poll(self) -> list[bytes] | None:
        """The payloads of all ranks at rank 0, nothing at others; None while it goes on. Never waits."""


class DoneGather:
    """The gather of a single process."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload

    def poll(self) -> list[bytes] | None:
        return [self._payload]


class MpiGather:
    """A gather over MPI; progress is made by polling."""

    def __init__(self, communicator: Any, byte: Any, payload: bytes) -> None:
        self._payload, self._length = payload, len(payload)
        root = communicator.Get_rank() == 0
        self._all = bytearray(communicator.Get_size() * self._length) if root else None
        into = None if self._all is None else [self._all, self._length, byte]
        self._request = communicator.Igather([payload, byte], into, root=0)

    def poll(self) -> list[bytes] | None:
        if not self._request.Test():
            return None
        gathered = self._all or b""
        return [bytes(gathered[i : i + self._length]) for i in range(0, len(gathered), self._length)]


class GlooGather:
    """A gather over a gloo group, which makes progress in its own threads."""

    def __init__(self, group: Any, payload: bytes) -> None:
        import torch
        from torch import distributed

        self._own = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        root = distributed.get_rank() == 0
        self._all = (
            [torch.empty_like(self._own) for _ in range(distributed.get_world_size())] if root else None
        )
        self._work: Any = distributed.gather(self._own, self._all, dst=0, group=group, async_op=True)

    def poll(self) -> list[bytes] | None:
        if not self._work.is_completed():
            return None
        try:
            self._work.wait()
        except RuntimeError as error:
            raise LostRankError("lost the connection to a rank: it ended or cannot be reached") from error
        return [part.numpy().tobytes() for part in self._all or []]


def wait_for(gather: PendingGather, timeout_seconds: float) -> list[bytes] | None:
    """Polls until the gather is done; None if it is not within the time."""
    deadline = time.monotonic() + timeout_seconds
    while (parts := gather.poll()) is None and time.monotonic() < deadline:
        time.sleep(1e-4)
    return parts
