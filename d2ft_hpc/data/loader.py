"""Torch data loaders over a MicroBatchSampler and over a replica's share of an evaluation set."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from d2ft_hpc.data.sampler import MicroBatchSampler

Images = Dataset[tuple[Tensor, int]]
Batches = DataLoader[Any]  # yields images float32 [samples, 3, size, size] and labels int64 [samples]


def train_loader(
    dataset: Images, sampler: MicroBatchSampler, *, num_workers: int = 0, pin_memory: bool = False
) -> Batches:
    """Micro-batches of one replica in the sampler's order; call `sampler.set_epoch` before each iteration.

    Random augmentation depends on (sampler.seed, epoch, sample) alone: the number of workers, the replica
    that drew the sample and a resume in mid-epoch change nothing; the caller's random state stays as it was.
    """
    return DataLoader(
        _SeededDraws(dataset, sampler.seed),
        batch_sampler=_Draws(sampler),
        pin_memory=pin_memory,
        **_options(num_workers),
    )


def eval_loader(
    dataset: Images,
    *,
    batch_size: int,
    replicas: int = 1,
    replica: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Batches:
    """This replica's share of a data set, in order: every sample is in exactly one replica's share.

    Shares differ by at most one sample, so the number of batches may differ between replicas.
    """
    share = Subset(dataset, range(replica, len(dataset), replicas))  # type: ignore[arg-type]
    return DataLoader(share, batch_size=batch_size, pin_memory=pin_memory, **_options(num_workers))


def _options(num_workers: int) -> dict[str, Any]:
    # A generator of its own: otherwise each iteration would draw from the caller's.
    options: dict[str, Any] = {"num_workers": num_workers, "generator": torch.Generator()}
    if num_workers == 0:
        return options
    # Workers are never forked from this process: a fork after MPI_Init is undefined.
    methods = multiprocessing.get_all_start_methods()
    context = "forkserver" if "forkserver" in methods else "spawn"
    return {**options, "multiprocessing_context": context, "persistent_workers": True}


class _Draws(Sampler[list[tuple[int, int]]]):
    """The sampler's micro-batches as (epoch, index): persistent workers learn of a new epoch no other way."""

    def __init__(self, sampler: MicroBatchSampler) -> None:
        self._sampler = sampler

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices in self._sampler:
            yield [(self._sampler.epoch, index) for index in indices]


class _SeededDraws(Dataset[tuple[Tensor, int]]):
    """Reads sample `index` with the random generator set by (seed, epoch, index)."""

    def __init__(self, dataset: Images, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, draw: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = draw
        state = np.random.SeedSequence((self._seed, epoch, index)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also reseed the accelerators, which fork_rng does not give back here.
            torch.default_generator.manual_seed(int(state[0]))
            return self._dataset[index]
