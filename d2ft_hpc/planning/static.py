"""Planning for fixed shapes: every block of every row runs equally many heads FULL and FORWARD_ONLY."""

from __future__ import annotations

import numpy as np

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.knapsack import plan_with_bound
from d2ft_hpc.planning.level_coverage import demand_of, take_turns, unpaid_coverage
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.problem import PlanProblem
from d2ft_hpc.planning.teams import Team, fitting_levels, make_teams, meeting_replicas


def solve_static(
    problem: PlanProblem,
    *,
    forward_weight: float = 1.0,
    backward_weight: float = 1.0,
    most_shortcut: float = 1.0,
    coverage: int = 0,
) -> SkipPlan:
    """Maximise the objective of `solve_joint` with one level for all blocks and rows of a replica.

    Stages whose ranks differ in speed have levels of their own, and then one for each stage.

    On every rank each (row, block) then has the same number of heads of each operation: shapes never change. Which
    heads these are follows the scores. All levels are tried, so the plan is the best of its kind: bound = objective,
    gap = 0 (without coverage, for which heads of a rank take turns). Options and errors are those of `solve_makespan`.
    """
    operations = np.full(problem.forward_score.shape, Operation.SHORTCUT, dtype=np.uint8)
    bound = 0.0
    for replicas in meeting_replicas(problem):
        teams = make_teams(problem, replicas, forward_weight, backward_weight, most_shortcut)
        demand = demand_of(problem, coverage, replicas)
        for alike in [teams] if _have_the_same_levels(teams) else [[team] for team in teams]:
            value = sum(team.levels.value.sum(axis=0) for team in alike)
            fits = np.logical_and.reduce([fitting_levels(problem, team) for team in alike])
            for team in alike:
                full = team.levels.backward_heads.min(axis=1) * team.slots
                fits &= full >= demand * len(team.levels.forward_gain)
            if not fits.any():
                raise PlanError(unpaid_coverage(problem, alike[0], coverage))
            level = int(np.argmax(np.where(fits, value, -np.inf)))
            bound += float(value[level])
            for team in alike:
                team.write(np.full(len(team.levels.value), level), operations)
                take_turns(team, operations, demand)
    if coverage == 0:
        bound = problem.objective(operations, forward_weight, backward_weight)
    return plan_with_bound(
        problem,
        operations,
        planner="static",
        status="optimal" if coverage == 0 else "the best level, with heads in turn",
        forward_weight=forward_weight,
        backward_weight=backward_weight,
        bound=bound,
    )


def _have_the_same_levels(teams: list[Team]) -> bool:
    first = teams[0].levels
    return all(
        np.array_equal(team.levels.forward_heads, first.forward_heads)
        and np.array_equal(team.levels.backward_heads, first.backward_heads)
        for team in teams
    )
