"""Rows of the results' tables beside the steps: scores, plans, events."""

from __future__ import annotations

from datetime import datetime, timezone

import numpy as np

from d2ft_hpc.execution.block_runner import MOST_SHAPES
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.metering import StepCosts
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.results import ResultsWriter
from d2ft_hpc.scores import Scores

_OF_PLAN = (
    *("operations", "hash", "planner", "replicas", "binding"),
    *("objective", "bound", "gap", "status", "solve_seconds"),
)
"""Columns that hold what the plan says itself."""


def record_scores(writer: ResultsWriter, scores: Scores, step: int) -> None:
    """Writes the scores that the next plan is made from."""
    writer.append("scores", {"step": step, **vars(scores)})


def record_plan(
    costs: StepCosts, executor: PlanExecutor, writer: ResultsWriter, plan: SkipPlan, step: int, seconds: float
) -> None:
    """executor: the plan is in force on it. `step` is the first one under the plan."""
    writer.append(
        "plans",
        {
            "step": step,
            **{name: getattr(plan, name) for name in _OF_PLAN},
            "grids": np.zeros((plan.num_rows, 2), np.int64) if plan.grids is None else plan.grids,
            "planned_compute": costs.planned_share(plan),
            "planned_time": max(
                float(costs.of_replica(plan, replica).mean()) / costs.dense_flops
                for replica in range(plan.replicas)
            ),
            "block_shapes": executor.block_shapes,
            "micro_batch_shapes": executor.micro_batch_shapes,
            "most_shapes": MOST_SHAPES,
        },
    )
    note(writer, step, "plan", plan.hash, seconds)


def note(writer: ResultsWriter, step: int, kind: str, text: str, seconds: float = 0.0) -> None:
    """Records an event; `step` is the number of steps done before."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    writer.append("events", {"step": step, "time": now, "kind": kind, "text": text, "seconds": seconds})
