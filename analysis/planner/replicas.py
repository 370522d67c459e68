"""How long a run's plan takes rank 0, and how large it is, against the number of replicas:

OMP_NUM_THREADS=1 python -m analysis.planner.replicas >> analysis/planner/replicas.jsonl
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np

from d2ft_hpc.lifecycle import PlanContext, PlanCosts, make_plan
from d2ft_hpc.metering import StepCosts
from d2ft_hpc.parallel.rank_layout import Placement
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.scores import Scores

SLOTS, BLOCKS, HEADS = 4, 12, 12
"""ViT-B, four micro-batches a replica."""


def context_of(planner: str, replicas: int, *, alike: bool) -> PlanContext:
    """alike: all ranks are equally fast; else each tenth is half as fast as the others."""
    ones = np.ones(BLOCKS)
    costs = StepCosts(
        0.2e9, 0.7e9 * ones, 0.25e9 * ones, np.full(BLOCKS, HEADS), ones.astype(bool), score_flops=1e9
    )
    speeds = None if alike else [0.5 if rank % 10 == 0 else 1.0 for rank in range(replicas)]
    return PlanContext(
        PlanConfig(planner=planner, compute_budget=0.6),
        Placement.whole(replicas, 0, BLOCKS, HEADS),
        costs,
        PlanCosts.counted(costs, speeds, replicas),
        slots=SLOTS,
        micro_batch_size=16,
    )


def measured(planner: str, replicas: int, *, alike: bool = True) -> dict[str, object]:
    """Seconds of the clock and of the processor to make a plan from every replica's own scores; bytes as sent."""
    shape = (2, SLOTS * replicas, BLOCKS, HEADS)
    forward, backward = np.random.default_rng(0).lognormal(size=shape).astype(np.float32)
    context = context_of(planner, replicas, alike=alike)
    clock, cpu = time.perf_counter(), time.process_time()
    plan = make_plan(context, Scores(forward, backward, seconds=0.0), 0)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    return {
        "planner": planner,
        "replicas": replicas,
        "alike": alike,
        "seconds": clock,
        "cpu_seconds": cpu,
        "planned_replicas": len(set(context.followed.tolist())),
        "message_bytes": len(plan.to_message()),
        "plan_bytes": len(plan.to_bytes()),
        "score_bytes": forward.nbytes + backward.nbytes,
        "status": plan.status,
        "gap": plan.gap,
        "largest_memory_kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="replicas", description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8, 64, 1024, 4096])
    parser.add_argument("--planners", nargs="+", default=["tokens", "samples", "static", "makespan", "joint"])
    parser.add_argument(
        "--unlike", action="store_true", help="ranks of two speeds, which keep rows of their own"
    )
    options = parser.parse_args()
    for planner in options.planners:
        measured(planner, 2)  # what is loaded at the first use
        for replicas in options.replicas:
            print(json.dumps(measured(planner, replicas, alike=not options.unlike)), flush=True)


if __name__ == "__main__":
    main()
