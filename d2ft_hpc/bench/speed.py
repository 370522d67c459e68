"""Compares an engine's step time under a plan with dense steps, in turns: `d2ft-hpc bench speed`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from d2ft_hpc.bench.turns import Ratio, alternate
from d2ft_hpc.bench.workload import (
    Built,
    Workload,
    batch_of,
    build,
    described,
    loss_of,
    make_optimizer,
    model_of,
    posed,
    title,
)
from d2ft_hpc.engines.engine import MicroBatch
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.launch import Control, share
from d2ft_hpc.metering import meter
from d2ft_hpc.metering.flops import token_curve_of
from d2ft_hpc.planning import PLANNERS, Operation, SkipPlan, simulate, solve
from d2ft_hpc.planning.tokens import TokenOptions

_STEPS_OF_RUN = 1000
"""Number of steps over which a plan by tokens spreads its resolutions."""


def speed(workload: Workload, control: Control, planner: str, compute_budget: float) -> dict[str, Any]:
    """The ratio of step times under a plan and dense, beside what the plan promises. Of planner tokens, the mean over a
    run's steps."""
    entry = PLANNERS.get(planner)  # an unknown one is told where it is to plan
    sides = TokenOptions().sides if entry is not None and entry.scales_images else None
    built = build(workload, control, sides)
    engine, costs = built.engine, built.costs
    replicas, replica = built.placement.layout.replicas, built.placement.layout.replica
    shape = (workload.slots * replicas, *built.shape)
    nothing = SkipPlan(np.full(shape, Operation.SHORTCUT, dtype=np.uint8), replicas)
    dense = SkipPlan.dense(workload.slots, replicas, *shape[1:])
    if sides is None:
        problem = posed(built, workload, compute_budget)
        made = share(control, lambda: solve(problem, planner).to_message(), "the plan")
        plan = SkipPlan.from_message(made)
        of_run = {"plan": (plan, 1.0)}
        promised = simulate(plan, problem).step / simulate(dense, problem).step
    else:
        curve = token_curve_of(costs, compute_budget, [1] * _STEPS_OF_RUN)
        of_run = {
            f"{down} x {across}": (dense.at((down, across)), steps / _STEPS_OF_RUN)
            for (down, across), steps in zip(curve.grids, curve.steps, strict=True)
        }
        promised = (curve.share - costs.always_share) / (1 - costs.always_share)
    batch = batch_of(workload, replica)

    plans = {"dense": dense, **{name: plan for name, (plan, _) in of_run.items()}, "nothing": nothing}
    steps: dict[str, Callable[[], object]] = {name: lambda: engine.step(batch) for name in plans}
    plain = _plain(workload)
    steps["plain"] = lambda: plain.step(batch)

    def before(name: str) -> None:
        if name in plans:
            engine.executor.activate(plans[name], replica)

    seconds = alternate(steps, workload.steps, workload.device, control, before)
    under_plan = np.sum([weight * seconds[name] for name, (_, weight) in of_run.items()], axis=0)
    always = float(np.median(seconds["nothing"] / seconds["dense"]))
    images = workload.slots * workload.micro_batch_size * replicas
    return {
        **described(workload, control),
        "planner": planner,
        "compute_budget": compute_budget,
        "dense_seconds": float(np.median(seconds["dense"])),
        "dense_over_plain": asdict(Ratio.of(seconds["dense"], seconds["plain"])),
        "images_per_second": images / float(np.median(under_plan)),
        "plan_over_dense": asdict(Ratio.of(under_plan, seconds["dense"])),
        "of_run": {
            name: {"steps": weight, "over_dense": asdict(Ratio.of(seconds[name], seconds["dense"]))}
            for name, (_, weight) in of_run.items()
        },
        "promised_by_flops": sum(weight * costs.planned_share(plan) for plan, weight in of_run.values()),
        "always_share": always,
        "promised_by_time": always + (1 - always) * promised,
        "lookup_seconds": engine.executor.lookup_seconds,
        "bytes_sent": {
            "dense": _bytes_sent(built, batch, dense),
            "plan": _bytes_sent(built, batch, next(iter(of_run.values()))[0]),
        },
        "seconds": {name: of_name.tolist() for name, of_name in seconds.items()},
    }


def speed_report(result: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            title(result),
            f"dense step               {1e3 * result['dense_seconds']:9.2f} ms",
            f"  over one process's with the same samples and no engine  {Ratio(**result['dense_over_plain'])}",
            f"plan ({result['planner']}, {result['compute_budget']:.0%}): step over the dense one  "
            f"{Ratio(**result['plan_over_dense'])}",
            *(
                f"  images of {name} patches, {part['steps']:.0%} of the steps{'':8s}{Ratio(**part['over_dense'])}"
                for name, part in result["of_run"].items()
                if len(result["of_run"]) > 1
            ),
            f"images under the plan    {result['images_per_second']:9.0f} a second, all ranks",
            f"promised by FLOPs        {result['promised_by_flops']:9.4f}",
            f"promised by time         {result['promised_by_time']:9.4f}  (what always runs, measured at "
            f"{result['always_share']:.4f}, plus what the slowest ranks compute of the rest)",
            *(
                f"{name + ', bytes a step':25s}{result['bytes_sent']['plan'].get(name, 0):9d} of {sent} dense"
                for name, sent in result["bytes_sent"]["dense"].items()
            ),
        ]
    )


def _bytes_sent(built: Built, batch: list[MicroBatch], plan: SkipPlan) -> dict[str, int]:
    """What a rank sends in a step, by collective, counted where it is issued."""
    built.engine.executor.activate(plan, built.placement.layout.replica)
    with meter() as metered:
        built.engine.step(batch)
    return dict(metered.bytes_sent)


def _plain(workload: Workload) -> PlainEngine:
    """Dense training of one process, each rank by itself: the reference for what engines add."""
    model = model_of(workload)
    executor = attach(model, compile=workload.compile)
    return PlainEngine(
        model,
        executor,
        *make_optimizer(model),
        loss_of,
        autocast_dtype=torch.bfloat16 if workload.precision == "bf16" else None,
        cuda_graphs=workload.cuda_graphs,
    )
