"""One entry for all planners of micro-batches."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.plan import SkipPlan
from d2ft_hpc.planning.problem import PlanProblem, check
from d2ft_hpc.planning.table import PLANNERS
from d2ft_hpc.settings import meant


def solve(problem: PlanProblem, planner: str, **options: Any) -> SkipPlan:
    """The plan of the named planner, checked against the budgets, with `solve_seconds` filled in.

    options: keyword options of the planner's function (`solve_joint` for "joint", ...); none for "dense".

    Raises PlanError if the planner is unknown, plans samples or has no such option, an option is out of range, or no
    plan keeps the budgets (for "dense": any budget below the dense cost).
    """
    start = time.perf_counter()
    choices = {name: entry for name, entry in PLANNERS.items() if entry.plans_heads}
    if planner not in choices:
        raise PlanError(f"There is no planner {planner!r} of micro-batches: {meant(planner, choices)}")
    known = choices[planner].parameters
    for name in choices[planner].needed:
        if name not in options:
            raise PlanError(f"Planner {planner} needs the option {name}.")
    for name in options:
        if name not in known:
            raise PlanError(
                f"Planner {planner} has no option {name}; it knows {', '.join(known) or 'none'}. Leave it out or "
                f"choose another planner."
            )
    plan = choices[planner].solve(problem, **options)
    check(plan, problem)
    return dataclasses.replace(plan, solve_seconds=time.perf_counter() - start)
