"""One entry for all planners."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable
from typing import Any, Literal

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

    Raises PlanError if the planner is unknown or has no such option, an option is out of range, or no plan keeps the
    budgets (for "dense": any budget below the dense cost).
    """
    start = time.perf_counter()
    if planner not in PLANNERS:
        raise PlanError(f"There is no planner {planner!r}; choose one of {', '.join(PLANNERS)}.")
    known = options_of(planner)
    for name, is_needed in known.items():
        if is_needed and name not in options:
            raise PlanError(f"Planner {planner} needs the option {name}.")
    for name in options:
        if name not in known:
            raise PlanError(
                f"Planner {planner} has no option {name}; it knows {', '.join(known) or 'none'}. Leave it out or "
                f"choose another planner."
            )
    plan = PLANNERS[planner](problem, **options)
    check(plan, problem)
    return dataclasses.replace(plan, solve_seconds=time.perf_counter() - start)


def options_of(planner: str) -> dict[str, bool]:
    """The options that a planner knows, and whether it cannot do without; none for a planner that there is not."""
    if planner not in PLANNERS:
        return {}
    parameters = inspect.signature(PLANNERS[planner]).parameters
    return {name: each.default is each.empty for name, each in parameters.items() if name != "problem"}


def solve_dense(problem: PlanProblem) -> SkipPlan:
    """Every head FULL in every row."""
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


PLANNERS: dict[str, Callable[..., SkipPlan]] = {
    "dense": solve_dense,
    "paper": solve_paper,
    "joint": solve_joint,
    "makespan": solve_makespan,
    "static": solve_static,
    "depth": solve_depth,
    "greedy": solve_greedy,
    "random": solve_random,
    "last_blocks": solve_last_blocks,
    "stochastic_depth": solve_stochastic_depth,
    "pruning": solve_pruning,
    "routing": solve_routing,
}
"""What makes the plan of each planner."""
