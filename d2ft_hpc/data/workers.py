"""How torch's data loaders start their worker processes here, and how these tell of faults."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from d2ft_hpc.data.lost_worker import batches_of
from d2ft_hpc.errors import D2ftError

_MOST_WORKERS = 16
_READ_AHEAD = 3
"""Batches of each worker: two that torch asks for ahead, and one on its way."""


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
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if context.get_start_method() == "forkserver":
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
    worker was killed."""
    for batch in batches_of(loader):
        if isinstance(batch, D2ftError):
            raise batch
        yield batch


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
