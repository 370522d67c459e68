"""Turns the loss of a data worker that was killed into one error, however torch notices it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from d2ft_hpc.errors import LostWorkerError

_PATIENCE_SECONDS = 3.0
"""How long to wait for a dead worker's exit status after the fault that its death causes."""

_WHY = {
    signal.SIGKILL: "by the kernel, if the job ran out of memory: use fewer data.workers, or ask for more memory",
    signal.SIGBUS: "/dev/shm is too small for its batches: make it larger, or use fewer data.workers (0 needs none)",
}


def batches_of(loader: DataLoader[Any]) -> Iterator[Any]:
    """What the loader yields. Raises LostWorkerError if one of its processes was killed."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:  # as chance will have it
            message = _end_of_a_worker(getattr(batches, "_workers", ()))
            if message is None:
                raise
            raise LostWorkerError(message) from error
        yield batch


def _end_of_a_worker(workers: Any) -> str | None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while workers and time.monotonic() < deadline:
        for worker in workers:
            if worker.exitcode is not None and worker.exitcode < 0:
                number = signal.Signals(-worker.exitcode)
                why = _WHY.get(number, "data.workers=0 reads without such processes")
                return f"a data worker (process {worker.pid}) was killed by {number.name}: {why}"
        time.sleep(0.05)
    return None
