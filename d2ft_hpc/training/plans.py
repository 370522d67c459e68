"""Scores, plans and their broadcast during a run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from d2ft_hpc.config import PlanConfig
from d2ft_hpc.data.loader import train_loader
from d2ft_hpc.engines.engine import LossFunction, MicroBatch
from d2ft_hpc.launch import Control, share
from d2ft_hpc.metering import StepCosts
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


def measure_scores(job: Job, model: VisionTransformer, loss_function: LossFunction) -> Scores | None:
    """Scores averaged over the first batches of the sampler's epoch; on all ranks together, the same on each.

    model: the job's model, or a copy with its present weights.
    None for planners that read no scores.
    """
    config = job.config.plan
    if config.planner in ("dense", "random"):
        return None
    start = time.perf_counter()
    loader = train_loader(job.train_set, job.sampler)
    of_slots = [
        torch.cat([fisher_information(model, job.executor.subnets, *pair, loss_function) for pair in batch])
        for batch in islice(batches_of(job, loader), config.probe_batches)
    ]
    fisher = rows_of_all(job.control, torch.stack(of_slots).mean(0))
    backward = fisher
    if config.backward_score == "weight_magnitude":
        magnitude = weight_magnitude(model, job.executor.subnets).cpu().numpy()
        backward = np.broadcast_to(magnitude, fisher.shape)
    return Scores(fisher, backward, time.perf_counter() - start)


def make_plan(job: Job, scores: Scores | None, same_rows: bool = False) -> SkipPlan:
    """Rank 0 solves; every rank gets the same plan or raises the same PlanError.

    same_rows: all replicas follow the same rows.
    """

    def solve_here() -> SkipPlan:
        return solve_configured(
            job.config.plan,
            scores,
            job.costs,
            slots=job.config.data.slots,
            replicas=job.control.world_size,
            subnets=job.executor.subnets.shape,
            seed=job.config.run.seed,
            same_rows=same_rows,
        )

    return SkipPlan.from_bytes(share(job.control, lambda: solve_here().to_bytes(), "the plan"))


def batches_of(job: Job, micro_batches: Iterable[MicroBatch]) -> Iterator[list[MicroBatch]]:
    """Groups what a loader over the job's sampler yields into batches on the job's device, in slot order."""
    on_device = ((images.to(job.device), labels.to(job.device)) for images, labels in micro_batches)
    while batch := list(islice(on_device, job.config.data.slots)):
        yield batch


def solve_configured(
    config: PlanConfig,
    scores: Scores | None,
    costs: StepCosts,
    *,
    slots: int,
    replicas: int,
    subnets: tuple[int, int],
    seed: int,
    same_rows: bool = False,
) -> SkipPlan:
    """The plan that `config` asks for, on this rank alone.

    subnets: (blocks, heads). same_rows: one replica's plan, by the scores' mean over the replicas, for all of them.
    """
    if config.planner == "dense":
        return SkipPlan.dense(slots, replicas, *subnets)
    posed_replicas = 1 if same_rows else replicas

    def posed(values: np.ndarray) -> np.ndarray:
        by_copy = values.astype(np.float64).reshape(slots, -1, posed_replicas, *subnets)
        mean: np.ndarray = by_copy.mean(axis=1).reshape(-1, *subnets)
        return mean

    equal = np.ones((slots * replicas, *subnets))
    problem = PlanProblem.parallel(
        posed(equal if scores is None else scores.forward),
        posed(equal if scores is None else scores.backward),
        replicas=posed_replicas,
        compute_budget=config.compute_budget,
        communication_budget=config.communication_budget,
        memory_budget=config.memory_budget,
        forward_cost=costs.forward_share,
        always_share=costs.always_share,
    )
    plan = solve(problem, config.planner, **_planner_options(config, seed))
    copies = replicas // posed_replicas
    return replace(
        plan,
        operations=plan.operations.repeat(copies, axis=0),
        replicas=replicas,
        objective=plan.objective * copies,
        bound=plan.bound * copies,
    )


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


def rows_of_all(control: Control, own: Tensor) -> np.ndarray:
    """[row, block, head] of all replicas from each replica's own [slot, block, head]."""
    of_slots = own.cpu().numpy().astype("<f4")
    parts = [
        np.frombuffer(part, "<f4").reshape(of_slots.shape) for part in control.all_gather(of_slots.tobytes())
    ]
    return np.stack(parts, axis=1).reshape(-1, *of_slots.shape[1:])
