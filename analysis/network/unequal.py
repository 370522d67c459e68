"""Two ranks, one of them on a core that it shares with a busy process; on two idle cores:

mpirun -n 2 python -m analysis.network.unequal
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from analysis.engines.parallel import CLASSES, IMAGE_SIZE, Sizes
from analysis.network.slow_links import die_with_parent
from d2ft_hpc.command import share as share_of
from d2ft_hpc.command import whole_number
from d2ft_hpc.config import OptimizerConfig
from d2ft_hpc.engines.deepspeed import DeepSpeedEngine, deepspeed_config
from d2ft_hpc.engines.optimizer import build_optimizer, build_schedule
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.launch import Control, connect, detect, run_guarded, share
from d2ft_hpc.metering import StepCosts, measure_costs
from d2ft_hpc.metering.phases import COMMUNICATION, timed_step
from d2ft_hpc.planning import Budgets, Devices, SkipPlan, pose, solve
from d2ft_hpc.training.speed_watch import SpeedWatch

RANKS = 2
SIZES = Sizes(blocks=6, heads=4, micro_batches=8, samples=4)


@dataclass
class Phase:
    """Steps under one plan. idle, seconds: of each step, the share that a rank waits at the meeting point, and all."""

    plan_shares: list[float]
    """Of the dense FLOPs, by rank."""
    busy_rank: int
    idle: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def benchmark(control: Control, *, compute_budget: float, steps: int) -> dict[str, Any]:
    """Trains two data-parallel replicas, each on a core of its own, while a busy process shares rank 1's core and then
    rank 0's; on both ranks together.

    Plans: equal shares; shares by the speeds watched under it; the same plan after the busy process has moved; the
    next plan after that. All of them spend `compute_budget` of the dense FLOPs in the mean of the ranks.
    Raises ConfigError without two ranks and two cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if control.world_size != RANKS or len(cores) < RANKS:
        raise ConfigError(
            f"unequal: needs 2 ranks and 2 cores, not {control.world_size} and {len(cores)}: mpirun -n 2 python -m "
            f"analysis.network.unequal"
        )
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {cores[control.rank]})
    torch.set_num_threads(1)
    engine, costs = _engine(control)
    watch = SpeedWatch(control)
    speeds = [1.0] * RANKS
    phases: dict[str, Phase] = {}

    def run(name: str, plan: SkipPlan, busy_rank: int) -> None:
        phase = Phase(
            [
                float(costs.planned_flops(plan.for_replica(rank)).mean()) / costs.dense_flops
                for rank in range(RANKS)
            ],
            busy_rank,
        )
        watch.begin_plan()
        with _busy_process(control, cores[busy_rank]):
            for step in range(steps + 1):
                idle, seconds = _step(control, engine, plan, costs, watch)
                if step > 0:
                    phase.idle.append(idle)
                    phase.seconds.append(seconds)
        phases[name] = phase

    equal = _plan(control, costs, speeds, compute_budget)
    run("equal", equal, busy_rank=1)
    speeds = watch.speeds(speeds)
    aware = _plan(control, costs, speeds, compute_budget)
    run("aware", aware, busy_rank=1)
    run("moved", aware, busy_rank=0)
    speeds = watch.speeds(speeds)
    run("followed", _plan(control, costs, speeds, compute_budget), busy_rank=0)

    def told(phase: Phase) -> dict[str, Any]:
        idle_seconds = [idle * seconds for idle, seconds in zip(phase.idle, phase.seconds, strict=True)]
        return {
            "busy_rank": phase.busy_rank,
            "plan_shares": phase.plan_shares,
            "step_seconds": float(np.median(phase.seconds)),
            "idle_seconds": float(np.mean(idle_seconds)),
            "idle_share": float(np.mean(phase.idle)),
            "all_idle_seconds": idle_seconds,
            "all_step_seconds": phase.seconds,
        }

    result: dict[str, Any] = {name: told(phase) for name, phase in phases.items()}
    result["idle_fall"] = 1 - result["aware"]["idle_seconds"] / result["equal"]["idle_seconds"]
    result["idle_fall_after_move"] = 1 - result["followed"]["idle_seconds"] / result["moved"]["idle_seconds"]
    result["steps"] = steps
    return result


def report(result: dict[str, Any], *, as_json: bool) -> str:
    """A line for each plan; with `as_json` the last line is the result as one JSON object."""
    lines = [
        f"{'plan':<9} {'busy beside':>11} {'shares of dense':>16} {'step s':>7} {'waiting s':>10} {'of step':>8}"
    ]
    for name in ("equal", "aware", "moved", "followed"):
        of_plan = result[name]
        shares = " ".join(f"{share:.2f}" for share in of_plan["plan_shares"])
        lines.append(
            f"{name:<9} {'rank ' + str(of_plan['busy_rank']):>11} {shares:>16} {of_plan['step_seconds']:>7.3f} "
            f"{of_plan['idle_seconds']:>10.4f} {of_plan['idle_share']:>8.1%}"
        )
    lines.append(
        f"waiting falls by {result['idle_fall']:.1%} from equal shares to shares by speed, and by "
        f"{result['idle_fall_after_move']:.1%} with the first plan after the busy process moved"
    )
    if as_json:
        lines.append(json.dumps(result))
    return "\n".join(lines)


def _engine(control: Control) -> tuple[DeepSpeedEngine, StepCosts]:
    torch.manual_seed(0)
    model = SIZES.model()
    executor = attach(model)
    costs = measure_costs(model, executor, (3, IMAGE_SIZE, IMAGE_SIZE))
    settings = OptimizerConfig(name="sgd", learning_rate=1e-4)
    optimizer = build_optimizer(model, settings)
    config = deepspeed_config(
        {},
        micro_batch_size=SIZES.samples,
        slots=SIZES.micro_batches,
        precision="fp32",
        gradient_clipping=None,
    )
    schedule = build_schedule(optimizer, settings, 1_000_000)
    return DeepSpeedEngine(model, executor, optimizer, schedule, F.cross_entropy, config), costs


def _plan(control: Control, costs: StepCosts, speeds: list[float], compute_budget: float) -> SkipPlan:
    scores = np.exp(
        np.random.default_rng(0).standard_normal((2, SIZES.micro_batches * RANKS, SIZES.blocks, SIZES.heads))
    )
    problem = pose(scores, costs, Budgets(compute_budget), Devices(RANKS, speed=speeds))
    return SkipPlan.from_bytes(share(control, lambda: solve(problem, "joint").to_bytes(), "the plan"))


def _step(
    control: Control, engine: DeepSpeedEngine, plan: SkipPlan, costs: StepCosts, watch: SpeedWatch
) -> tuple[float, float]:
    """The share of the step in which one of the ranks waits for the other, and its seconds."""
    engine.executor.activate(plan, control.rank)
    generator = torch.Generator().manual_seed(control.rank)
    batch = [
        (
            torch.randn(SIZES.samples, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
            torch.randint(CLASSES, (SIZES.samples,), generator=generator),
        )
        for _ in range(SIZES.micro_batches)
    ]
    control.barrier(60)
    with timed_step(torch.device("cpu")) as times:
        engine.step(batch)
    flops = float(costs.planned_flops(plan.for_replica(control.rank)).sum() * SIZES.samples)
    watch.add(flops, times)
    seconds = times.seconds()
    own = struct.pack("<2d", seconds.get(COMMUNICATION, 0.0), sum(seconds.values()))
    of_ranks = np.array([struct.unpack("<2d", part) for part in control.all_gather(own)])
    step = float(of_ranks[:, 1].max())
    return float(np.ptp(of_ranks[:, 0])) / step, step


@contextmanager
def _busy_process(control: Control, core: int) -> Iterator[None]:
    """Rank 0 keeps a process busy on a core meanwhile."""
    process = None
    if control.rank == 0:

        def pin() -> None:
            die_with_parent()
            os.sched_setaffinity(0, {core})

        process = subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=pin)
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="unequal", description="Equal shares against shares by watched speeds, on two idle cores."
    )
    parser.add_argument("--compute-budget", type=share_of(), default=0.6, help="share of the dense step")
    parser.add_argument(
        "--steps", type=whole_number(1), default=10, help="measured steps of each plan (default: 10)"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    control = connect(detect(), device_type="cpu")

    def run() -> None:
        result = benchmark(control, compute_budget=options.compute_budget, steps=options.steps)
        if control.rank == 0:
            print(report(result, as_json=options.json))

    return run_guarded(control, run)


if __name__ == "__main__":
    sys.exit(run_guarded(None, main))
