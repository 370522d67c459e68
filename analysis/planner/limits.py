"""What planners do with a time limit: a line of JSON for each, with wall and processor seconds, gap and status.

OMP_NUM_THREADS=1 taskset -c 0 python -m analysis.planner.limits > analysis/planner/limits.jsonl

The deadline is of the processor's clock, so that other work on the machine does not count.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from d2ft_hpc.planning import Budgets, Devices, GivenShares, PlanProblem, in_order, pose, solve

ROWS, BLOCKS, HEADS, STAGES = 80, 64, 32, 4
SPEEDS = (1.0, 0.8, 0.9, 0.7, 0.85)
LIMITS = (1e-6, 0.2, 0.5, 2.0)
BY_HEAD = {"communication_budget": 0.5, "memory_budget": 0.45}
BY_MEETING = {"communication_budget": 0.5, "messages": "replicated"}


def unequal_stages(ranks: int, limited: dict[str, Any]) -> PlanProblem:
    devices = Devices(
        rank=in_order(BLOCKS, HEADS, ranks),
        stage=np.arange(BLOCKS) * STAGES // BLOCKS,
        speed=np.resize(SPEEDS, STAGES * ranks).tolist(),
    )
    scores = np.random.default_rng(0).lognormal(0, 0.7, (2, ROWS, BLOCKS, HEADS))
    budgets = Budgets(0.6, limited["communication_budget"], limited.get("memory_budget"))
    return pose(scores, GivenShares(0.3517), budgets, devices, limited.get("messages"))


def measure(planner: str, ranks: int, budgets: dict[str, Any], **options: Any) -> None:
    problem = unequal_stages(ranks, budgets)
    wall, cpu = time.perf_counter(), time.process_time()
    plan = solve(problem, planner, **options)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found = {
        "wall_seconds": round(wall, 3),
        "cpu_seconds": round(cpu, 3),
        "gap": plan.gap,
        "status": plan.status,
    }
    print(json.dumps({"planner": planner, "ranks": ranks, **budgets, **options, **found}), flush=True)


if __name__ == "__main__":
    time.monotonic = time.process_time
    for ranks in (8, 1):
        for seconds in LIMITS:
            measure("makespan", ranks, BY_HEAD, time_limit_seconds=seconds)
            measure("joint", ranks, BY_HEAD, time_limit_seconds=seconds)
            measure("depth", ranks, BY_HEAD, time_limit_seconds=seconds)
        measure("static", ranks, BY_HEAD)
        measure("paper", ranks, {})
    for seconds in LIMITS:
        measure("makespan", 8, BY_MEETING, time_limit_seconds=seconds)
