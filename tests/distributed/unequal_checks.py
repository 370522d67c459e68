"""Run under a launcher on two ranks: one is slower than the other; rank 0 prints JSON."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch

from d2ft_hpc.launch import Control, connect, detect
from d2ft_hpc.lifecycle.costs import PlanCosts
from d2ft_hpc.metering import meter
from d2ft_hpc.metering.phases import timed_step
from d2ft_hpc.planning import PlanProblem, solve
from d2ft_hpc.training.speed_watch import SpeedWatch
from tests.distributed.engine_checks import SLOTS, deepspeed_engine, micro_batch, plan_of
from tests.models import DEPTH, HEADS, tiny_vit
from tests.posing import pose_flat


def problem_of(costs: PlanCosts) -> PlanProblem:
    scores = np.exp(np.random.default_rng(0).standard_normal((2, 2 * SLOTS, DEPTH, HEADS)))
    return pose_flat(
        *scores,
        replicas=2,
        compute_budget=0.95,
        forward_cost=0.4,
        device_speed=costs.device_speed,
    )


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
    results: dict[str, Any] = {
        "blocks": _blocks_that_nobody_trains(control),
        "speeds": check_speeds(control),
    }
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
