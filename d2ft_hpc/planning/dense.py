"""No skipping: the plan that every other one is compared with."""

from __future__ import annotations

from dataclasses import replace

from d2ft_hpc.planning.plan import SkipPlan
from d2ft_hpc.planning.planner import Planner
from d2ft_hpc.planning.problem import PlanProblem


def solve_dense(problem: PlanProblem) -> SkipPlan:
    """Every head FULL in every row."""
    plan = SkipPlan.dense(problem.slots, problem.replicas, *problem.forward_score.shape[1:])
    objective = problem.objective(plan.operations)
    return replace(plan, objective=objective, bound=objective)


DENSE = Planner(
    "dense",
    "every head FULL in every micro-batch",
    solve_dense,
    reads_scores=False,
    keeps_budgets=False,
    makes_few_shapes=True,
)
