"""What a run writes into its results file besides its steps and evaluations: itself, its scores, plans and events."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone

import numpy as np

from d2ft_hpc.execution.executor import MOST_SHAPES, PlanExecutor
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.results import ResultsWriter
from d2ft_hpc.scores import Scores
from d2ft_hpc.training.environment import describe_parameters
from d2ft_hpc.training.job import Job
from d2ft_hpc.training.measured import Measured


def record_job(
    job: Job, writer: ResultsWriter, environment: Mapping[str, str | int], measured: Measured
) -> None:
    """What does not change during a run."""
    writer.put("config", {"yaml": job.config.to_yaml()})
    writer.put("environment", {}, environment)
    writer.put(
        "model",
        describe_parameters(job.model, job.executor.subnets),
        {
            "name": job.config.model.name,
            "num_blocks": job.executor.subnets.num_blocks,
            "num_heads": job.executor.subnets.num_heads,
            "frozen_blocks": json.dumps(np.flatnonzero(~job.costs.trains).tolist()),
            "always_flops": job.costs.always_flops,
            "full_flops": job.costs.full_flops,
            "forward_only_flops": job.costs.forward_only_flops,
            "dense_pass_seconds": measured.profile.dense_seconds,
            "always_pass_seconds": measured.profile.always_seconds,
            "dense_kept_bytes": measured.kept.of(job.costs.num_subnets) if measured.kept else math.nan,
            "plan_costs": json.dumps(asdict(measured.plan_costs)),
            "all_reduce_seconds": measured.all_reduce.latency,
            "all_reduce_seconds_per_byte": measured.all_reduce.per_byte,
        },
    )


def record_scores(writer: ResultsWriter, scores: Scores, step: int) -> None:
    """Of the plan that is made next."""
    writer.append(
        "scores",
        {
            "step": step,
            "forward": scores.forward,
            "backward": scores.backward,
            "forward_name": scores.forward_name,
            "backward_name": scores.backward_name,
            "seconds": scores.seconds,
            "flops": scores.flops,
            "cached": scores.cached,
        },
    )


def record_plan(
    job: Job, executor: PlanExecutor, writer: ResultsWriter, plan: SkipPlan, step: int, seconds: float
) -> None:
    """executor: has loaded the plan. `step` is the first one under the plan."""
    writer.append(
        "plans",
        {
            "step": step,
            "operations": plan.operations,
            "hash": plan.hash,
            "planner": plan.planner,
            "replicas": plan.replicas,
            "binding": plan.binding,
            "objective": plan.objective,
            "bound": plan.bound,
            "gap": plan.gap,
            "status": plan.status,
            "solve_seconds": plan.solve_seconds,
            "planned_compute": job.costs.planned_share(plan),
            "planned_time": max(
                float(job.costs.planned_flops(plan.for_replica(replica)).mean()) / job.costs.dense_flops
                for replica in range(plan.replicas)
            ),
            "block_shapes": executor.block_shapes,
            "micro_batch_shapes": executor.micro_batch_shapes,
            "most_shapes": MOST_SHAPES,
        },
    )
    note(writer, step, "plan", plan.hash, seconds)


def note(writer: ResultsWriter | None, step: int, kind: str, text: str, seconds: float = 0.0) -> None:
    """Records an event; `step` is the number of steps done before."""
    if writer is not None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        writer.append("events", {"step": step, "time": now, "kind": kind, "text": text, "seconds": seconds})
