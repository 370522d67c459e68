"""A run's scores, measured by passes beside its training."""

from __future__ import annotations

import copy
import hashlib
import struct
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from d2ft_hpc import __version__
from d2ft_hpc.data.loader import train_loader
from d2ft_hpc.engines.engine import Engine, LossFunction, MicroBatch
from d2ft_hpc.errors import DataError
from d2ft_hpc.launch import share
from d2ft_hpc.launch.control import print_line
from d2ft_hpc.launch.watch import Watch
from d2ft_hpc.lifecycle.controller import ScoreSource
from d2ft_hpc.lifecycle.rows import rows_of_all
from d2ft_hpc.lifecycle.solve import reads_scores
from d2ft_hpc.metering import meter
from d2ft_hpc.metering.memory import release_unused
from d2ft_hpc.score_table import SCORES
from d2ft_hpc.scores import Scores, gradient_scores, scores_of_weights
from d2ft_hpc.scores.measured import ScoreCache, digest
from d2ft_hpc.training.job import Job


class ProbeScores(ScoreSource):
    """Scores of a plan at once, from an engine's present weights."""

    def __init__(self, job: Job, engine: Engine, watch: Watch) -> None:
        self._job, self._engine, self._watch = job, engine, watch

    def measure(self) -> Scores | None:
        with self._engine.full_model() as model:
            return measure_scores(self._job, model, self._job.loss, self._watch)


def measure_scores(job: Job, model: nn.Module, loss_function: LossFunction, watch: Watch) -> Scores | None:
    """Scores averaged over the first batches of the sampler's epoch; on all ranks together, the same on each.

    None for planners that read no scores.
    """
    config = job.config.plan
    if not reads_scores(config):
        return None
    start = time.perf_counter()
    if config.score_cache is None:
        return _measure(job, model, loss_function, watch, start)
    cache = ScoreCache(Path(config.score_cache))
    key = _cache_key(job, model)
    if kept := share(job.control, lambda: cache.read(key), "the cached scores"):
        return Scores.from_bytes(kept)
    scores = _measure(job, model, loss_function, watch, start)
    if job.control.rank == 0:
        try:
            cache.write(key, scores)
        except DataError as error:  # they have been measured: the run goes on with them
            print_line(f"d2ft-hpc: warning: {error}")
    return scores


def _probe(job: Job) -> Iterator[list[MicroBatch]]:
    # The epoch's first batches, also where the run resumed in mid-epoch.
    sampler = copy.copy(job.sampler)
    sampler.set_epoch(job.sampler.epoch)
    loader = train_loader(job.train_set, sampler, device=job.device)
    return islice(job.batches(loader), job.config.plan.probe_batches)


def _measure(job: Job, model: nn.Module, loss_function: LossFunction, watch: Watch, start: float) -> Scores:
    config, subnets = job.config.plan, job.executor.subnets
    names = (config.forward_score, config.backward_score)
    gradient_names = [name for name in names if SCORES[name].reads_gradients]
    autocast_dtype = torch.bfloat16 if job.config.engine.precision == "bf16" else None
    lora = job.config.model.lora
    adapters = lora is None or lora.scores == "adapters"
    with meter() as metered:
        measured = [
            [
                gradient_scores(
                    model,
                    subnets,
                    *pair,
                    loss_function,
                    gradient_names,
                    autocast_dtype=autocast_dtype,
                    adapters=adapters,
                )
                for pair in batch
            ]
            for batch in (watch.along(_probe(job)) if gradient_names else ())
        ]
    release_unused(job.device)
    rows: dict[str, np.ndarray] = {
        name: rows_of_all(
            job.control,
            job.layout,
            torch.stack([torch.cat([of_pair[name] for of_pair in batch]) for batch in measured]).mean(0),
            speaks=job.layout.leads_replica,
        )
        for name in gradient_names
    }
    for name in set(names) - set(gradient_names):
        of_all_rows = scores_of_weights(SCORES[name], model, subnets, adapters).cpu().numpy()
        rows[name] = np.broadcast_to(of_all_rows, job.plan_shape)
    flops = sum(
        struct.unpack("<d", part)[0] for part in job.control.all_gather(struct.pack("<d", metered.flops))
    )
    forward, backward = (rows[name] for name in names)
    return Scores(forward, backward, time.perf_counter() - start, *names, flops)


def _cache_key(job: Job, model: nn.Module) -> str:
    """Of all ranks' weights and images and of the settings that decide the scores."""
    config = job.config
    settings = {
        "version": __version__,
        "scores": [config.plan.forward_score, config.plan.backward_score],
        "label_smoothing": config.train.label_smoothing,
        "precision": config.engine.precision,
        "lora": config.model.lora and config.model.lora.scores,
        "shape": job.plan_shape,
    }
    tensors = (tensor for batch in _probe(job) for pair in batch for tensor in pair)
    parts = job.control.all_gather(digest(model, tensors, settings))
    return hashlib.sha256(b"".join(parts)).hexdigest()
