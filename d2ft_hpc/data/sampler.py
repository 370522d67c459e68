"""Which samples make up each micro-batch: the same on every rank for the same seed, epoch and batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from d2ft_hpc.errors import DataError


class MicroBatchSampler(Sampler[list[int]]):
    """Yields this replica's micro-batches as lists of sample indices, in slot order, `slots` for each batch.

    A batch has slots * replicas rows (micro-batches); row = slot * replicas + replica. One permutation per
    (seed, epoch), identical on all replicas, is cut into batches and each batch into its rows. The last batch of an
    epoch may be partial: its samples are spread over the rows so that their sizes differ by at most one, or dropped
    if there are fewer samples than rows. So every replica has the same number of batches and micro-batches. Raises
    DataError if an epoch would have no batch.
    """

    def __init__(
        self, num_samples: int, *, micro_batch_size: int, slots: int, replicas: int, replica: int, seed: int
    ) -> None:
        self.rows = slots * replicas
        if num_samples < self.rows:
            raise DataError(
                f"the training data has {num_samples} samples, fewer than the {self.rows} micro-batches of "
                f"one batch ({slots} slots x {replicas} replicas): use fewer slots or ranks, or more data"
            )
        self.num_samples = num_samples
        self.slots = slots
        self.replicas = replicas
        self.replica = replica
        self.seed = seed
        self.batch_size = micro_batch_size * self.rows
        full, rest = divmod(num_samples, self.batch_size)
        self.batch_samples = [self.batch_size] * full + [rest] * (rest >= self.rows)
        """Of each batch of an epoch, over all replicas."""
        self.batches_per_epoch = len(self.batch_samples)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch that the next iteration draws, and how many of its first batches to skip."""
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        return max(self.batches_per_epoch - self.start_batch, 0) * self.slots

    def __iter__(self) -> Iterator[list[int]]:
        permutation = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_samples)
        for batch in range(self.start_batch, self.batches_per_epoch):
            samples = permutation[batch * self.batch_size :][: self.batch_size]
            for row in np.array_split(samples, self.rows)[self.replica :: self.replicas]:
                yield row.tolist()
