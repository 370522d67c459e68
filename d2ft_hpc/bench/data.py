"""How fast a configuration's training images arrive, without a model: `d2ft-hpc bench data`."""

from __future__ import annotations

import time
from itertools import islice
from typing import Any

import torch

from d2ft_hpc.config import RunConfig
from d2ft_hpc.data.datasets import open_split
from d2ft_hpc.data.loader import train_loader, workers_of
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
    begin = time.perf_counter()
    first, warm_up, count, epoch = 0.0, 2 * max(workers, 1), 0, 0
    start = end = begin
    done = 0
    while end - start < seconds or done <= warm_up:
        sampler.set_epoch(epoch)
        for batch, _ in islice(loader, None):
            done += 1
            if done == 1:
                first = time.perf_counter() - begin
            if done == warm_up:  # what the workers had read ahead is used up
                start = _now(device)
            elif done > warm_up:
                count += len(batch)
            end = time.perf_counter()
            if done > warm_up and end - start >= seconds:
                break
        epoch += 1
    return {
        "images_per_second": count / (_now(device) - start),
        "first_batch_seconds": first,
        "images": count,
        "workers": workers,
        "device": str(device),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
