"""Gathering payloads at rank 0 while all ranks go on with their work."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

from d2ft_hpc.errors import LostRankError


class PendingGather(Protocol):
    """A gather that was started on all ranks. Whoever started it polls it until it is done."""

    def poll(self) -> bytes | None:
        """The payloads of all ranks, one after the other, at rank 0, nothing at others; None while it goes on. Never
        waits."""

    def wait(self, timeout_seconds: float) -> bytes | None:
        """As `poll`, when the gather is done or the time is up."""


class DoneGather:
    """The gather of a single process."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload

    def poll(self) -> bytes | None:
        return self._payload

    def wait(self, timeout_seconds: float) -> bytes | None:
        return self._payload


class MpiGather:
    """A gather over MPI; progress is made by polling."""

    def __init__(self, communicator: Any, byte: Any, payload: bytes) -> None:
        self._payload = payload
        root = communicator.Get_rank() == 0
        self._all = bytearray(communicator.Get_size() * len(payload)) if root else bytearray()
        into = [self._all, len(payload), byte] if root else None
        self._request = communicator.Igather([payload, byte], into, root=0)

    def poll(self) -> bytes | None:
        return bytes(self._all) if self._request.Test() else None

    def wait(self, timeout_seconds: float) -> bytes | None:
        deadline = time.monotonic() + timeout_seconds
        while (payloads := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(1e-4)
        return payloads


class GlooGather:
    """A gather over a gloo group, which makes progress in its own threads."""

    def __init__(self, group: Any, payload: bytes) -> None:
        import torch
        from torch import distributed

        self._own = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        ranks = distributed.get_world_size() if distributed.get_rank() == 0 else 0
        self._all = self._own.new_empty((ranks, len(payload)))
        into = list(self._all) if ranks else None
        self._work: Any = distributed.gather(self._own, into, dst=0, group=group, async_op=True)

    def poll(self) -> bytes | None:
        if not self._work.is_completed():
            return None
        try:
            self._work.wait()
        except RuntimeError as error:
            raise LostRankError("lost the connection to a rank: it ended or cannot be reached") from error
        return bytes(self._all.numpy().tobytes())

    def wait(self, timeout_seconds: float) -> bytes | None:
        # Without polling: many ranks that share cores would keep each other from the very work they wait for.
        with suppress(RuntimeError):  # the time is up, or a rank is lost: `poll` knows
            self._work.wait(timedelta(seconds=timeout_seconds))
        return self.poll()
