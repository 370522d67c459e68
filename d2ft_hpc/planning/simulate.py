"""Simulates the time of a plan on ranks that wait for each other, as if devices did nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from d2ft_hpc.planning.arrays import Floats
from d2ft_hpc.planning.communication_volume import ByDirection
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.problem import BUDGET_EPSILON, PlanProblem


@dataclass(frozen=True, eq=False)
class Timing:
    """Times of one step in the problem's unit: one FULL head on a device of speed 1.

    forward, backward: float64 [row, block], in which all of the block's ranks are done. They meet after each.
    busy: float64 [device], the device's own work. step: of the slowest replica, with its pipeline.
    """

    forward: Floats
    backward: Floats
    busy: Floats
    step: float

    @property
    def idle(self) -> Floats:
        """Share of the step in which each device waits for others, float64 [device]."""
        if self.step == 0:
            return np.zeros_like(self.busy)
        idle = 1 - self.busy / self.step
        return np.where(idle > BUDGET_EPSILON, idle, 0.0)  # less is float error


def simulate(
    plan: SkipPlan, problem: PlanProblem, with_messages: Callable[[Floats, Floats], ByDirection] | None = None
) -> Timing:
    """The plan's step with tensor-parallel ranks that meet after the forward and the backward of every block, a 1F1B
    pipeline over the stages, and replicas that meet at the end or, if the problem says so, in every block. SHORTCUT's
    own cost counts as forward.

    with_messages: takes the time of the slowest rank's work in every (row, block), forward and backward, and returns
    that of work and messages, in the unit of the problem's costs; None: there are no messages.
    """
    problem.require_shape(plan)
    shortcut, forward_only, full = problem.compute_cost
    forward_cost = np.array([shortcut, forward_only, forward_only])[plan.operations]
    backward_cost = np.where(plan.operations == Operation.FULL, full - forward_only, 0.0)
    own = [_of_ranks(cost, problem) for cost in (forward_cost, backward_cost)]
    forward, backward = (work.max(axis=2) for work in own)
    if problem.replicas_meet:
        slowest = [
            times.reshape(-1, problem.replicas, times.shape[1]).max(axis=1) for times in (forward, backward)
        ]
        forward, backward = (np.repeat(of_slot, problem.replicas, axis=0) for of_slot in slowest)
    if with_messages is not None:
        both = with_messages(forward, backward)
        forward, backward = both.forward, both.backward
    busy = problem.used_compute(plan) / problem.device_speed
    steps = []
    for replica in range(problem.replicas):
        rows = slice(replica, None, problem.replicas)
        stage_times = [
            np.stack([times[rows][:, problem.stage == stage].sum(axis=1) for stage in range(problem.stages)])
            for times in (forward, backward)
        ]
        steps.append(pipeline_time(*stage_times))
    return Timing(forward, backward, busy, max(steps))


def _of_ranks(cost: Floats, problem: PlanProblem) -> Floats:
    """Time of every rank in every block of every row, float64 [row, block, rank]."""
    rows, blocks, _ = cost.shape
    work = np.zeros((rows, blocks, problem.ranks))
    for rank in range(problem.ranks):
        work[:, :, rank] = (cost * (problem.rank == rank)).sum(axis=2)
    return np.asarray(work / problem.device_speed.reshape(-1, problem.ranks)[problem.replica_stage])


def pipeline_time(forward: Floats, backward: Floats) -> float:
    """When a 1F1B pipeline has done all rows: forward, backward float64 [stage, row], times of its parts.

    Stage s of S runs the forwards of S - s rows before its first backward and takes turns from then on (Narayanan et
    al., 2021, arXiv 2104.04473; DeepSpeed's TrainSchedule). Messages take no time.
    """
    stages, rows = forward.shape
    forward_done = np.full((stages, rows), np.nan)
    backward_done = np.full((stages, rows), np.nan)
    clock = np.zeros(stages)
    waiting = [_schedule(stages - stage, rows) for stage in range(stages)]
    while any(waiting):
        for stage in range(stages):
            while waiting[stage]:
                is_forward, row = waiting[stage][0]
                if is_forward:
                    ready = forward_done[stage - 1, row] if stage > 0 else 0.0
                else:
                    ready = backward_done[stage + 1, row] if stage + 1 < stages else forward_done[stage, row]
                if np.isnan(ready):
                    break
                waiting[stage].pop(0)
                times, done = (forward, forward_done) if is_forward else (backward, backward_done)
                clock[stage] = max(clock[stage], ready) + times[stage, row]
                done[stage, row] = clock[stage]
    return float(clock.max())


def _schedule(ahead: int, rows: int) -> list[tuple[bool, int]]:
    """The order of one stage's parts: (is forward, row), with at most `ahead` rows under way."""
    order = [(True, row) for row in range(min(ahead, rows))]
    for row in range(rows):
        order.append((False, row))
        if row + ahead < rows:
            order.append((True, row + ahead))
    return order
