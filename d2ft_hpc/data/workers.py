"""How torch's data loaders start their worker processes here, and how these tell of faults."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from d2ft_hpc.errors import D2ftError, LostWorkerError

_MOST_WORKERS = 16
_READ_AHEAD = 3
"""Batches of each worker: two that torch asks for ahead, and one on its way."""
_PATIENCE_SECONDS = 3.0
"""How long to wait for a dead worker's exit status after the fault that its death causes."""

_WHY = {
    signal.SIGKILL: "by the kernel, if the job ran out of memory: use fewer data.workers, or ask for more memory",
    signal.SIGBUS: "/dev/shm is too small for its batches: make it larger, or use fewer data.workers (0 needs none)",
}


class Reader(Protocol):
    """What workers hold."""

    def __getitems__(self, keys: Sequence[Any], /) -> Any:
        """A batch of what `keys` name."""
        ...


def automatic_workers(cores: float, ranks_of_host: int, batch_bytes: int) -> int:
    """How many workers a rank has whose images must be decoded: its cores but one for the rank itself, and as many as
    have place for the batches that they read ahead in half of its share of /dev/shm.

    cores: of this rank, see `share_of_cores`.
    """
    place = _MOST_WORKERS
    with suppress(OSError):
        free = shutil.disk_usage("/dev/shm").free
        place = free // (2 * ranks_of_host * _READ_AHEAD * batch_bytes)
    return max(min(int(cores) - 1, place, _MOST_WORKERS), 0)


def loader_of(
    reader: Reader,
    batches: Iterable[Sequence[Any]],
    *,
    num_workers: int,
    persistent: bool = True,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Reads batches of keys in `num_workers` processes, or in this one (0); `read_with` iterates.

    Workers are never forked from this process (a fork after MPI_Init is undefined), and the caller's random state stays
    as it was.
    """
    options: dict[str, Any] = {}
    if num_workers > 0:
        context = multiprocessing.get_context("forkserver")
        # Imported once, by the process from which all workers are forked.
        context.set_forkserver_preload(["__main__", __name__, type(reader).__module__])
        options = {"multiprocessing_context": context, "persistent_workers": persistent}
    return DataLoader(
        _Handing(reader),
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own: otherwise each iteration would draw from the caller's
        **options,
    )


def read_with(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches in order. Raises the reader's D2ftError, the same with workers as without, and LostWorkerError if a
    worker was killed, however torch notices it."""
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
        if isinstance(batch, D2ftError):
            raise batch
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


class _Handing(Dataset[Any]):
    """Returns faults as values, since torch would raise a worker's error again with its whole traceback as the
    text."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        try:
            return self._reader.__getitems__(keys)
        except D2ftError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch
