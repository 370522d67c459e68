"""A run's scores, measured by passes beside its training."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import nn

from d2ft_hpc.data.loader import train_loader
from d2ft_hpc.engines.engine import Engine, LossFunction, MicroBatch
from d2ft_hpc.launch import gathered
from d2ft_hpc.launch.watch import Watch
from d2ft_hpc.lifecycle.controller import ScoreSource
from d2ft_hpc.lifecycle.gather_scores import gather_scores
from d2ft_hpc.lifecycle.make_plan import reads_scores
from d2ft_hpc.metering import meter
from d2ft_hpc.metering.memory import release_unused
from d2ft_hpc.score_table import SCORES
from d2ft_hpc.scores import Scores, gradient_scores, scores_of_weights
from d2ft_hpc.training.job import Job


class ProbeScores(ScoreSource):
    """Scores of a plan at once, from an engine's present weights."""

    def __init__(self, job: Job, engine: Engine, watch: Watch) -> None:
        self._job, self._engine, self._watch = job, engine, watch

    def measure(self) -> Scores | None:
        with self._engine.full_model() as model:
            return measure_scores(self._job, model, self._job.loss, self._watch)


def measure_scores(job: Job, model: nn.Module, loss_function: LossFunction, watch: Watch) -> Scores | None:
    """Scores of the first batch of the sampler's epoch; None for planners that read no scores. All ranks call it
    together and return the same.
    """
    config = job.config.plan
    if not reads_scores(config):
        return None
    start, subnets = time.perf_counter(), job.executor.subnets
    names = (config.forward_score, config.backward_score)
    gradient_names = [name for name in names if SCORES[name].reads_gradients]
    autocast_dtype = torch.bfloat16 if job.config.engine.precision == "bf16" else None
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
                )
                for pair in batch
            ]
            for batch in (watch.along(_probe(job)) if gradient_names else ())
        ]
    release_unused(job.device)
    rows: dict[str, np.ndarray] = {
        name: gather_scores(
            job.control,
            job.layout,
            torch.stack([torch.cat([of_pair[name] for of_pair in batch]) for batch in measured]).mean(0),
            speaks=job.layout.leads_replica,
        )
        for name in gradient_names
    }
    for name in set(names) - set(gradient_names):
        of_all_rows = scores_of_weights(SCORES[name], model, subnets).cpu().numpy()
        rows[name] = np.broadcast_to(of_all_rows, job.plan_shape)
    flops = sum(gathered(job.control, float(metered.flops)))
    forward, backward = (rows[name] for name in names)
    return Scores(forward, backward, time.perf_counter() - start, *names, flops)


def _probe(job: Job) -> Iterator[list[MicroBatch]]:
    # The epoch's first batch, also where the run resumed in mid-epoch.
    sampler = copy.copy(job.sampler)
    sampler.set_epoch(job.sampler.epoch)
    loader = train_loader(job.train_set, sampler, device=job.device)
    return islice(job.batches(loader), 1)
