"""Scores, plans and their broadcast during a run."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2ft_hpc.config import PlanConfig
from d2ft_hpc.data.loader import train_loader
from d2ft_hpc.engines.engine import LossFunction, MicroBatch
from d2ft_hpc.launch import Control, share
from d2ft_hpc.launch.watch import Watch
from d2ft_hpc.planning import PlanProblem, SkipPlan, solve
from d2ft_hpc.scores import fisher_information, weight_magnitude
from d2ft_hpc.training.job import Job


@dataclass(frozen=True)
class Scores:
    """Contribution scores, float32 [row, block, head]; row = slot * replicas + replica."""

    forward: np.ndarray
    backward: np.ndarray
    seconds: float
    """Time that measuring them took, charged to the run."""


def is_due(config: PlanConfig, *, epoch: int, step_of_epoch: int, steps_done: int) -> bool:
    """Whether a plan is to be made before this step; steps and epochs count from 0."""
    every = config.replan.every
    if every is None:
        return steps_done == 0
    if config.replan.unit == "epochs":
        return step_of_epoch == 0 and epoch % every == 0
    return steps_done % every == 0


def measure_scores(job: Job, loss_function: LossFunction, watch: Watch) -> Scores | None:
    """Scores averaged over the first batches of the sampler's epoch; on all ranks together, the same on each.

    None for planners that read no scores.
    """
    config = job.config.plan
    if config.planner in ("dense", "random"):
        return None
    start = time.perf_counter()
    # The epoch's first batches, also where the run resumed in mid-epoch.
    sampler = copy.copy(job.sampler)
    sampler.set_epoch(job.sampler.epoch)
    loader = train_loader(job.train_set, sampler)
    of_slots = [
        torch.cat(
            [fisher_information(job.model, job.executor.subnets, *pair, loss_function) for pair in batch]
        )
        for batch in watch.along(islice(batches_of(job, loader), config.probe_batches))
    ]
    fisher = _rows_of_all(job.control, torch.stack(of_slots).mean(0))
    backward = fisher
    if config.backward_score == "weight_magnitude":
        magnitude = weight_magnitude(job.model, job.executor.subnets).cpu().numpy()
        backward = np.broadcast_to(magnitude, fisher.shape)
    return Scores(fisher, backward, time.perf_counter() - start)


def make_plan(job: Job, scores: Scores | None) -> SkipPlan:
    """Rank 0 solves; every rank gets the same plan or raises the same PlanError."""
    return SkipPlan.from_bytes(share(job.control, lambda: _solve(job, scores).to_bytes(), "the plan"))


def batches_of(job: Job, micro_batches: Iterable[MicroBatch]) -> Iterator[list[MicroBatch]]:
    """Groups what a loader over the job's sampler yields into batches on the job's device, in slot order."""
    on_device = ((images.to(job.device), labels.to(job.device)) for images, labels in micro_batches)
    while batch := list(islice(on_device, job.config.data.slots)):
        yield batch


def _solve(job: Job, scores: Scores | None) -> SkipPlan:
    config, replicas = job.config.plan, job.control.world_size
    if config.planner == "dense":
        rows, blocks, heads = job.plan_shape
        return SkipPlan.dense(rows // replicas, replicas, blocks, heads)
    equal = np.ones(job.plan_shape)
    problem = PlanProblem.parallel(
        equal if scores is None else scores.forward.astype(np.float64),
        equal if scores is None else scores.backward.astype(np.float64),
        replicas=replicas,
        compute_budget=config.compute_budget,
        communication_budget=config.communication_budget,
        memory_budget=config.memory_budget,
        forward_cost=job.costs.forward_share,
        always_share=job.costs.always_share,
    )
    return solve(problem, config.planner, **_planner_options(config, job.config.run.seed))


def _planner_options(config: PlanConfig, seed: int) -> dict[str, Any]:
    match config.planner:
        case "paper":
            return {"full_share": config.full_share}
        case "random":
            return {"full_share": config.full_share, "seed": seed}
        case "joint":
            return {"time_limit_seconds": config.time_limit_seconds, "coverage": config.coverage}
        case "makespan":
            return {"time_limit_seconds": config.time_limit_seconds, "most_shortcut": config.most_shortcut}
        case "static":
            return {"most_shortcut": config.most_shortcut}
        case "depth":
            return {
                "time_limit_seconds": config.time_limit_seconds,
                "below": config.below,
                "whole_rows": config.whole_rows,
            }
        case _:
            return {}


def _rows_of_all(control: Control, own: Tensor) -> np.ndarray:
    """[row, block, head] of all replicas from each replica's own [slot, block, head]."""
    of_slots = own.cpu().numpy().astype("<f4")
    parts = [
        np.frombuffer(part, "<f4").reshape(of_slots.shape) for part in control.all_gather(of_slots.tobytes())
    ]
    return np.stack(parts, axis=1).reshape(-1, *of_slots.shape[1:])
