"""No skipping: the plan that every other one is compared with."""

from __future__ import annotations

import numpy as np

from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.planner import Planner
from d2ft_hpc.planning.problem import PlanProblem


def solve_dense(problem: PlanProblem) -> SkipPlan:
    """Every head FULL in every row."""
    operations = np.full(problem.forward_score.shape, Operation.FULL, dtype=np.uint8)
    objective = problem.objective(operations)
    return SkipPlan(
        operations,
        problem.replicas,
        planner=DENSE.name,
        objective=objective,
        bound=objective,
        gap=0.0,
        status="dense",
    )


DENSE = Planner(
    "dense",
    "every head FULL in every micro-batch",
    solve_dense,
    reads_scores=False,
    keeps_budgets=False,
    makes_few_shapes=True,
)
