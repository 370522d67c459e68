"""How fast a configuration's training images arrive, without a model: `d2ft-hpc bench data`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from d2ft_hpc.config import RunConfig
from d2ft_hpc.data.datasets import open_split
from d2ft_hpc.data.loader import Batches, train_loader, workers_of
from d2ft_hpc.data.mixing import Mixing
from d2ft_hpc.data.sampler import MicroBatchSampler
from d2ft_hpc.launch.cores import own_cores
from d2ft_hpc.model.build import pixel_statistics


def benchmark(config: RunConfig, device: torch.device, seconds: float) -> dict[str, Any]:
    """Reads one replica's micro-batches for some seconds, on this process's device.

    Returns images_per_second, first_batch_seconds (workers start, files are opened), images, workers, device.
    """
    data = config.data
    mean, std = pixel_statistics(config.model.name, config.model.weights)
    images = open_split(data, "train", mean, std, seed=config.run.seed)
    sampler = MicroBatchSampler(
        len(images),
        micro_batch_size=data.micro_batch_size,
        slots=data.slots,
        replicas=1,
        replica=0,
        seed=config.run.seed,
    )
    mixing = Mixing(images.num_classes, **data.mixing_options)
    workers = workers_of(data, images, device, len(own_cores()), ranks_of_host=1)
    loader = train_loader(images, sampler, num_workers=workers, device=device, mixing=mixing)
    first, warm_up, count = 0.0, 2 * max(workers, 1), 0
    begin = start = time.perf_counter()
    for done, batch in enumerate(_epochs(sampler, loader), 1):
        if done == 1:
            first = time.perf_counter() - begin
        if done == warm_up:  # what the workers had read ahead is used up
            start = _now(device)
        elif done > warm_up:
            count += len(batch)
            if time.perf_counter() - start >= seconds:
                break
    return {
        "images_per_second": count / (_now(device) - start),
        "first_batch_seconds": first,
        "images": count,
        "workers": workers,
        "device": str(device),
    }


def _epochs(sampler: MicroBatchSampler, loader: Batches) -> Iterator[Tensor]:
    """The images of epoch after epoch, without end."""
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from (images for images, _ in loader)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
