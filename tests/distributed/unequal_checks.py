"""Run under a launcher on two ranks: one runs out of memory, or is slower than the other; rank 0 prints JSON."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from d2ft_hpc.engines.engine import MemoryShortError
from d2ft_hpc.launch import Control, connect, detect
from d2ft_hpc.lifecycle.costs import PlanCosts, with_less_memory
from d2ft_hpc.metering import meter
from d2ft_hpc.metering.memory import activation_limit
from d2ft_hpc.metering.phases import timed_step
from d2ft_hpc.planning import PlanProblem, solve
from d2ft_hpc.training.speed_watch import SpeedWatch
from tests.distributed.engine_checks import SLOTS, deepspeed_engine, largest_difference, micro_batch, plan_of
from tests.models import DEPTH, HEADS, tiny_vit

STEPS = 3
LIMIT_BYTES = 1.2e6
"""Room on rank 1 for most of what a micro-batch under the first plan keeps."""


def problem_of(costs: PlanCosts) -> PlanProblem:
    scores = np.exp(np.random.default_rng(0).standard_normal((2, 2 * SLOTS, DEPTH, HEADS)))
    return PlanProblem.parallel(
        *scores,
        replicas=2,
        compute_budget=0.95,
        forward_cost=0.4,
        device_speed=costs.device_speed,
        most_full=costs.most_full,
    )


def check_memory(control: Control, stage: int) -> dict[str, Any]:
    """Rank 1 falls short until its plan fits; beside a run that had that plan from the start."""

    def short(is_short: bool) -> tuple[int, ...]:
        return tuple(rank for rank, part in enumerate(control.all_gather(bytes([is_short]))) if part[0])

    def batch(step: int) -> list[Any]:
        return [micro_batch(step, slot * 2 + control.rank, 2 * SLOTS) for slot in range(SLOTS)]

    costs, told = PlanCosts(0.4, 0.0, [1.0, 1.0], "flops"), []
    plan = solve(problem_of(costs), "joint")
    first = plan
    engine = deepspeed_engine(tiny_vit(), "adamw", stage)
    engine.short_of_memory = short
    with activation_limit(LIMIT_BYTES) if control.rank == 1 else nullcontext():
        for step in range(STEPS):
            while True:
                engine.executor.activate(plan, control.rank)
                try:
                    engine.step(batch(step))
                    break
                except MemoryShortError as error:
                    told.append(error.ranks)
                    costs = with_less_memory(costs, plan, error.ranks, engine.executor.trains)
                    plan = solve(problem_of(costs), "joint")
    other = deepspeed_engine(tiny_vit(), "adamw", stage)
    for step in range(STEPS):
        other.executor.activate(plan, control.rank)
        other.step(batch(step))
    full = [int((each.for_replica(1) == 2).sum(axis=(1, 2)).max()) for each in (first, plan)]
    difference = largest_difference(*(dict(each._model.named_parameters()) for each in (engine, other)))
    return {"told": told, "full on rank 1": full, "difference": difference}


def check_speeds(control: Control) -> dict[str, Any]:
    """Rank 1 takes a nap in every forward, then rank 0 does."""
    engine = deepspeed_engine(tiny_vit(), "sgd", 0)
    watch = SpeedWatch(control)
    sleeper = 1

    def nap(*_: Any) -> None:
        if control.rank == sleeper:
            time.sleep(0.5)

    engine._model.register_forward_pre_hook(nap)
    costs, found = PlanCosts(0.4, 0.0, [1.0, 1.0], "flops"), {}
    for sleeper in (1, 0):
        plan = solve(problem_of(costs), "joint")
        watch.begin_plan()
        engine.executor.activate(plan, control.rank)
        for step in range(3):
            batch = [micro_batch(step, slot * 2 + control.rank, 2 * SLOTS) for slot in range(SLOTS)]
            with timed_step(torch.device("cpu")) as times:
                engine.step(batch)
            watch.add(1.0, times)
        costs = PlanCosts(0.4, 0.0, watch.speeds(costs.device_speed), "flops")
        plan = solve(problem_of(costs), "joint")
        work = [float(plan.for_replica(rank).sum()) for rank in range(2)]
        found[f"rank {sleeper} sleeps"] = {"speeds": costs.device_speed, "work": work}
    return found


def main() -> None:
    torch.set_num_threads(1)
    control = connect(detect(), device_type="cpu")
    results: dict[str, Any] = {f"memory zero{stage}": check_memory(control, stage) for stage in (0, 1)}
    results["blocks"] = _blocks_that_nobody_trains(control)
    results["speeds"] = check_speeds(control)
    if control.rank == 0:
        print("RESULTS " + json.dumps(results))
    control.close()


def _blocks_that_nobody_trains(control: Control) -> dict[str, list[float]]:
    """Under ZeRO 0 and 1: bytes of a step in which all blocks are trained, and of one in which block 1 is not."""
    sent: dict[str, list[float]] = {}
    for stage in (0, 1):
        engine = deepspeed_engine(tiny_vit(), "sgd", stage)
        for kind in ("full", "whole blocks"):
            engine.executor.activate(plan_of(kind, 0, control.world_size), control.rank)
            with meter() as metered:
                engine.step([micro_batch(0, slot, SLOTS) for slot in range(SLOTS)])
            sent.setdefault(f"zero{stage}", []).append(metered.bytes_sent["allreduce"])
    block = tiny_vit().blocks[1]
    return {**sent, "of block 1": [4.0 * sum(parameter.numel() for parameter in block.parameters())]}


if __name__ == "__main__":
    sys.exit(main())
