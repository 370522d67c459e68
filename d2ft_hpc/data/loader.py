"""Batches on the model's device, over a MicroBatchSampler or over a replica's share of an evaluation set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from d2ft_hpc.config import DataConfig
from d2ft_hpc.data.datasets import LabelledImages, RawBatch
from d2ft_hpc.data.mixing import Mixing
from d2ft_hpc.data.sampler import MicroBatchSampler
from d2ft_hpc.data.transforms import ImageSize
from d2ft_hpc.data.workers import Reader, automatic_workers, loader_of, read_with

CPU = torch.device("cpu")

EVALUATION_FACTOR = 4
"""Samples of a batch of evaluation over those of a micro-batch."""

_Drawn = tuple[RawBatch, tuple[int, ...]]
"""A batch and the entropy (seed, epoch, first sample) of what is drawn for the batch as a whole."""


class Batches:
    """Yields images float32 [sample, 3, size, size] and labels (int64 [sample], or float32 [sample, class] if mixed).

    Raises DataError if an image cannot be read.

    Workers read and decode ahead; resizing, cropping, flipping, normalising and mixing happen here, on `device`.
    """

    def __init__(
        self,
        reader: Reader,
        order: Any,
        finish: Callable[[_Drawn], tuple[Tensor, Tensor]],
        num_workers: int,
        device: torch.device,
    ) -> None:
        """reader, order: as `loader_of` takes them. finish: what is done on the device."""
        self._loader = loader_of(reader, order, num_workers=num_workers, pin_memory=device.type == "cuda")
        self._finish, self._device = finish, device

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for raw, entropy in read_with(self._loader):
            moved = RawBatch(*(tensor.to(self._device, non_blocking=True) for tensor in raw))
            yield self._finish((moved, tuple(entropy)))


def workers_of(
    data: DataConfig, images: LabelledImages, device: torch.device, cores: float, ranks_of_host: int
) -> int:
    """`data.workers`, or as many as its docstring says. cores: of this rank, see `share_of_cores`."""
    if data.workers is not None:
        return data.workers
    if device.type == "cpu" or not images.need_a_processor:
        return 0
    channels_bytes = 3 * (torch.float32.itemsize if data.augment == "timm" else 1)
    micro_batches = 1 + EVALUATION_FACTOR  # both loaders have workers of their own
    batch_bytes = micro_batches * data.micro_batch_size * channels_bytes * data.image_size**2
    return automatic_workers(cores, ranks_of_host, batch_bytes)


def train_loader(
    dataset: LabelledImages,
    sampler: MicroBatchSampler,
    *,
    num_workers: int = 0,
    device: torch.device = CPU,
    mixing: Mixing | None = None,
    size_at: Callable[[int], ImageSize] | None = None,
) -> Batches:
    """Micro-batches of one replica in the sampler's order; call `sampler.set_epoch` before each iteration.

    size_at: of the images of a step, counted from 0, where they are cut on the processor, so that its work follows the
    plan, too; None: all have full size.

    What is drawn for a sample depends on (sampler.seed, epoch, sample) alone: the number of workers, the replica
    that drew the sample and a resume in mid-epoch change nothing; the caller's random state stays as it was. Mixing
    draws depend on the micro-batch in the same way.
    """

    def finish(drawn: _Drawn) -> tuple[Tensor, Tensor]:
        images, labels = dataset.finish(drawn[0])
        return (images, labels) if mixing is None else mixing(images, labels, drawn[1])

    return Batches(_Drawing(dataset, sampler.seed), _Draws(sampler, size_at), finish, num_workers, device)


def eval_loader(
    dataset: LabelledImages,
    *,
    batch_size: int,
    replicas: int = 1,
    replica: int = 0,
    num_workers: int = 0,
    device: torch.device = CPU,
) -> Batches:
    """This replica's share of a data set, in order: every sample is in exactly one replica's share.

    Shares differ by at most one sample, so the number of batches may differ between replicas.
    """
    share = range(replica, len(dataset), replicas)
    order = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    return Batches(_InOrder(dataset), order, lambda drawn: dataset.finish(drawn[0]), num_workers, device)


_Draw = tuple[int, int, ImageSize | None]
"""Epoch, index of a sample, and the size that its image gets."""


class _Draws(Sampler[list[_Draw]]):
    """The sampler's micro-batches with all that workers have to know, since persistent ones learn of a new epoch in no
    other way."""

    def __init__(self, sampler: MicroBatchSampler, size_at: Callable[[int], ImageSize] | None) -> None:
        self._sampler, self._size_at = sampler, size_at

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[_Draw]]:
        sampler, size = self._sampler, None
        epoch, first = sampler.epoch, sampler.epoch * sampler.batches_per_epoch + sampler.start_batch
        for number, indices in enumerate(sampler):
            if self._size_at is not None:
                size = self._size_at(first + number // sampler.slots)
            yield [(epoch, index, size) for index in indices]


class _Drawing:
    """Reads micro-batches of draws, each sample with its own entropy (seed, epoch, index)."""

    def __init__(self, dataset: LabelledImages, seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __getitems__(self, draws: Sequence[_Draw]) -> _Drawn:
        entropies = [(self._seed, epoch, index) for epoch, index, _ in draws]
        return self._dataset.read([index for _, index, _ in draws], entropies, draws[0][2]), entropies[0]


class _InOrder:
    """Reads batches of indices without draws."""

    def __init__(self, dataset: LabelledImages) -> None:
        self._dataset = dataset

    def __getitems__(self, indices: Sequence[int]) -> _Drawn:
        return self._dataset.read(indices, None), ()
