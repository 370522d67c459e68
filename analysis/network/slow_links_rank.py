"""One rank of `slow_links`: trains under a dense, the paper's and a makespan plan in turn, and counts.

Each plan runs in the layout of tokens in which its first steps are fastest, the dense one too. A plan's ideal step is
the predicted one in that layout (`planning.step_time`), from the steps without throttle and the link's rate.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis.engines.parallel import TOKENS, Setting, Sizes, set_up
from analysis.network.slow_links import bits_per_second
from d2ft_hpc.engines.planned_bytes import PlannedBytes
from d2ft_hpc.launch import Control, connect, detect, run_guarded, share
from d2ft_hpc.metering import meter
from d2ft_hpc.parallel.tensor import TensorParallelExecutor
from d2ft_hpc.planning import Budgets, Operation, SkipPlan, simulate, solve
from d2ft_hpc.planning.communication_volume import LAYOUTS, TokenLayout
from d2ft_hpc.planning.step_time import StepTime


@dataclass
class Measured:
    """Of steps under one plan. bytes: over all ranks' interfaces. counted: what the meter says, over all ranks."""

    plan: SkipPlan
    layout: TokenLayout
    seconds: list[float] = field(default_factory=list)
    free_seconds: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    counted: float = 0.0
    told: float = 0.0
    """By the message model, over all ranks."""


def main() -> int:
    sys.stdin.readline()  # the links are up
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    control = connect(detect(), device_type="cpu")
    return run_guarded(control, lambda: _run(control, job))


def _run(control: Control, job: dict[str, Any]) -> None:
    sizes = Sizes(**job["sizes"])
    setting = set_up(control, stages=job["stages"], tensor_ranks=job["tensor_ranks"], sizes=sizes)
    budgets = Budgets(job["compute_budget"], job["communication_budget"])
    by_head = setting.problem(budgets)
    by_layout = {layout: setting.problem(budgets, messages=layout) for layout in LAYOUTS[:2]}

    def solved(planner: Any, problem: Any) -> SkipPlan:
        return SkipPlan.from_bytes(share(control, lambda: solve(problem, planner).to_bytes(), "a plan"))

    dense = Measured(setting.plan_of(Operation.FULL), "replicated")
    always = Measured(setting.plan_of(Operation.SHORTCUT), "replicated")
    for _ in range(job["repeats"] + 1):
        for each in (dense, always):
            each.free_seconds.append(_step(control, setting, each)[0])
    free_dense, free_always = (
        float(np.median(_of_all(control, float(np.median(each.free_seconds[1:])))))
        for each in (dense, always)
    )
    byte_seconds = 8 / bits_per_second(job["rate"])
    of_subnets = (free_dense - free_always) / simulate(dense.plan, by_head).step
    activation_bytes = 4.0 * sizes.samples * TOKENS * sizes.heads * sizes.head_size
    step_time = StepTime(max(of_subnets, 1e-12), activation_bytes, byte_seconds, latency=0.0)
    allowed = LAYOUTS if setting.placement.layout.tensor_ranks > 1 else LAYOUTS[:1]
    paper = solved("paper", by_head)
    makespan = {layout: solved("makespan", problem) for layout, problem in by_layout.items()}
    _throttle(control)
    plans = {
        "dense": _fastest(control, setting, [Measured(dense.plan, layout) for layout in allowed]),
        "paper": _fastest(control, setting, [Measured(paper, layout) for layout in allowed]),
        # Overlapped, a plan sends what it does sharded.
        "makespan": _fastest(
            control,
            setting,
            [Measured(makespan.get(layout, makespan["sharded"]), layout) for layout in allowed],
        ),
    }
    for each in plans.values():
        _count(control, setting, each)
    for _ in range(job["repeats"]):
        for each in plans.values():
            seconds, sent = _step(control, setting, each)
            each.seconds.append(seconds)
            each.bytes.append(sent)
    ideal = {
        name: free_always + step_time.of(each.plan, by_head, each.layout) for name, each in plans.items()
    }
    result = {
        "rate": job["rate"],
        "pipeline_stages": job["stages"],
        "tensor_parallel": job["tensor_ranks"],
        "sizes": job["sizes"],
        "compute_budget": job["compute_budget"],
        "communication_budget": job["communication_budget"],
        "repeats": job["repeats"],
        "free_dense_seconds": free_dense,
        "free_always_seconds": free_always,
        **{
            name: _told(setting, each, plans["dense"], ideal[name], ideal["dense"])
            for name, each in plans.items()
        },
    }
    if control.rank == 0:
        print(json.dumps(result), flush=True)


def _told(
    setting: Setting, each: Measured, dense: Measured, ideal_seconds: float, dense_ideal_seconds: float
) -> dict[str, Any]:
    step_seconds, sent = float(np.median(each.seconds)), float(np.median(each.bytes))
    ratios = [own / other for own, other in zip(each.seconds, dense.seconds, strict=True)]
    return {
        "interface_bytes": sent,
        "bytes_ratio": sent / float(np.median(dense.bytes)),
        "ideal_bytes_ratio": each.told / dense.told,
        "step_seconds": step_seconds,
        "step_ratio": float(np.median(ratios)),
        "ideal_step_seconds": ideal_seconds,
        "ideal_step_ratio": ideal_seconds / dense_ideal_seconds,
        "counted_bytes": each.counted,
        "model_bytes": each.told,
        "token_layout": each.layout,
        "planned_flops": setting.costs.planned_share(each.plan),
        "all_step_seconds": each.seconds,
    }


def _fastest(control: Control, setting: Setting, candidates: list[Measured]) -> Measured:
    """The one with the shortest of two steps after a first one, by rank 0's clock."""
    shortest = []
    for each in candidates:
        steps = [_step(control, setting, each)[0] for _ in range(3)]
        shortest.append(_of_all(control, min(steps[1:]))[0])
    return candidates[int(np.argmin(shortest))]


def _step(control: Control, setting: Setting, each: Measured) -> tuple[float, float]:
    """Seconds of a step until all ranks are done, and the bytes that all interfaces sent meanwhile."""
    executor = setting.engine.executor
    if isinstance(executor, TensorParallelExecutor):
        executor.use(each.layout)
    executor.activate(each.plan, setting.placement.layout.replica)
    batch = setting.batch()
    control.barrier(120)
    before, start = _interface_bytes(), time.perf_counter()
    setting.engine.step(batch)
    control.barrier(120)
    seconds, sent = time.perf_counter() - start, _interface_bytes() - before
    return seconds, sum(_of_all(control, sent))


def _count(control: Control, setting: Setting, each: Measured) -> None:
    """A step with the meter on, and what the message model says."""
    with meter() as metered:
        _step(control, setting, each)
    each.counted = sum(_of_all(control, float(sum(metered.bytes_sent.values()))))
    model = PlannedBytes(
        setting.model,
        setting.engine.executor,
        setting,
        precision="fp32",
        data_parallel="zero0",
    )
    each.told = sum(_of_all(control, model.of(each.plan, each.layout)))


def _interface_bytes() -> float:
    """Sent by this namespace so far, loopback not counted."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    fields = {name.strip(): values.split() for name, _, values in (line.partition(":") for line in lines)}
    return sum(float(values[8]) for name, values in fields.items() if name != "lo")


def _of_all(control: Control, value: float) -> list[float]:
    return [struct.unpack("<d", part)[0] for part in control.all_gather(struct.pack("<d", value))]


def _throttle(control: Control) -> None:
    """Asks the bridge's keeper for slow links from now on."""
    if control.rank == 0:
        print("throttle", flush=True)
        sys.stdin.readline()
    control.barrier(120)


if __name__ == "__main__":
    sys.exit(main())
