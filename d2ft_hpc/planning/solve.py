"""One entry for all planners."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal, get_args

import numpy as np

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.baselines import (
    solve_last_blocks,
    solve_pruning,
    solve_routing,
    solve_stochastic_depth,
)
from d2ft_hpc.planning.depth import solve_depth
from d2ft_hpc.planning.greedy import solve_greedy
from d2ft_hpc.planning.joint import solve_joint
from d2ft_hpc.planning.makespan import solve_makespan
from d2ft_hpc.planning.paper import solve_paper
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.problem import PlanProblem, check
from d2ft_hpc.planning.random_schedule import solve_random
from d2ft_hpc.planning.static import solve_static

Planner = Literal[
    "dense",
    "paper",
    "joint",
    "makespan",
    "static",
    "depth",
    "greedy",
    "random",
    "last_blocks",
    "stochastic_depth",
    "pruning",
    "routing",
]


def solve(problem: PlanProblem, planner: Planner, **options: Any) -> SkipPlan:
    """The plan of the named planner, checked against the budgets, with `solve_seconds` filled in.

    options: keyword options of the planner's function (`solve_joint` for "joint", ...); none for "dense".

    Raises PlanError if the planner is unknown, an option is out of range, or no plan keeps the budgets (for
    "dense": any budget below the dense cost).
    """
    start = time.perf_counter()
    match planner:
        case "dense":
            plan = _solve_dense(problem, **options)
        case "paper":
            plan = solve_paper(problem, **options)
        case "joint":
            plan = solve_joint(problem, **options)
        case "makespan":
            plan = solve_makespan(problem, **options)
        case "static":
            plan = solve_static(problem, **options)
        case "depth":
            plan = solve_depth(problem, **options)
        case "greedy":
            plan = solve_greedy(problem, **options)
        case "random":
            plan = solve_random(problem, **options)
        case "last_blocks":
            plan = solve_last_blocks(problem, **options)
        case "stochastic_depth":
            plan = solve_stochastic_depth(problem, **options)
        case "pruning":
            plan = solve_pruning(problem, **options)
        case "routing":
            plan = solve_routing(problem, **options)
        case _:
            raise PlanError(f"There is no planner {planner!r}; choose one of {', '.join(get_args(Planner))}.")
    check(plan, problem)
    return dataclasses.replace(plan, solve_seconds=time.perf_counter() - start)


def _solve_dense(problem: PlanProblem) -> SkipPlan:
    operations = np.full(problem.forward_score.shape, Operation.FULL, dtype=np.uint8)
    objective = problem.objective(operations)
    return SkipPlan(
        operations,
        problem.replicas,
        planner="dense",
        objective=objective,
        bound=objective,
        gap=0.0,
        status="dense",
    )
