"""Planning for fixed shapes: every block of every row runs equally many heads FULL and FORWARD_ONLY."""

from __future__ import annotations

import numpy as np

from d2ft_hpc.planning.knapsack import plan_with_bound
from d2ft_hpc.planning.makespan import fitting_levels, make_teams
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.problem import PlanProblem


def solve_static(
    problem: PlanProblem,
    *,
    forward_weight: float = 1.0,
    backward_weight: float = 1.0,
    most_shortcut: float = 1.0,
) -> SkipPlan:
    """Maximise the objective of `solve_joint` with one level for all blocks and rows of a replica.

    On every rank each (row, block) then has the same number of heads of each operation: shapes never change. Which
    heads these are follows the scores. All levels are tried, so the plan is the best of its kind: bound = objective,
    gap = 0. Options and errors are those of `solve_makespan`.
    """
    operations = np.full(problem.forward_score.shape, Operation.SHORTCUT, dtype=np.uint8)
    for replica in range(problem.replicas):
        teams = make_teams(problem, replica, forward_weight, backward_weight, most_shortcut)
        value = sum(team.levels.value.sum(axis=0) for team in teams)
        fits = np.logical_and.reduce([fitting_levels(problem, team) for team in teams])
        level = int(np.argmax(np.where(fits, value, -np.inf)))
        for team in teams:
            team.write(np.full(len(team.levels.value), level), operations)
    objective = problem.objective(operations, forward_weight, backward_weight)
    return plan_with_bound(
        problem,
        operations,
        planner="static",
        status="optimal",
        forward_weight=forward_weight,
        backward_weight=backward_weight,
        bound=objective,
    )
