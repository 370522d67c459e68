"""The optimal planner: both levels of the knapsack at once, as a mixed-integer program. HiGHS proves its optimum."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.arrays import Floats, Ints, Operations
from d2ft_hpc.planning.bounds import plan_with_bound, upper_bound
from d2ft_hpc.planning.greedy import greedy
from d2ft_hpc.planning.highs import OPTIMAL, Rows, maximise_integer, reason_against
from d2ft_hpc.planning.knapsack import Knapsack, device_knapsacks
from d2ft_hpc.planning.multiple_choice import share_of_time
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.planner import Planner, WithShortcuts
from d2ft_hpc.planning.prices import RELATIVE_GAP
from d2ft_hpc.planning.problem import PlanProblem

_NAMES = 3  # of devices that one status may name

_GREEDY_SHARE = (
    2 / 3
)  # share of the time limit after which the remaining devices get a quicker plan than the greedy one


@dataclass(frozen=True, eq=False)
class _Solution:
    """Operations uint8 [cell] of a knapsack, their score, a bound on what any could score, and how it ended."""

    operations: Operations
    score: float
    bound: float
    status: str

    @property
    def missing(self) -> float:
        return self.bound - self.score


def solve_joint(
    problem: PlanProblem,
    *,
    time_limit_seconds: float = 10.0,
    relative_gap: float = RELATIVE_GAP,
    most_shortcut: float = 1.0,
) -> SkipPlan:
    """Maximise the forward scores of all cells that run plus the backward scores of the FULL ones under every device's
    budgets; scores are divided by their means (`PlanProblem.gains`).

    time_limit_seconds: wall-clock time for all devices together.
    relative_gap: a plan that is proved to be this near its optimum is good enough, in [0, 1).
    most_shortcut: share in [0, 1] of a device's heads in a (row, block) that may be SHORTCUT.

    The devices share nothing: each is solved by itself and the bounds add up.
    Where HiGHS runs out of time or fails, the greedy plan is taken if it is better: the status is then "greedy:
    <reason>" and the bound still holds. Where there is no time for that either, a device runs the cells that gain
    most. The same problem gives the same plan, unless time runs out.

    Raises PlanError if an option is out of range, or if the budgets cannot pay for `most_shortcut` (the message states
    the least feasible budget).
    """
    if not time_limit_seconds > 0:
        raise PlanError(f"time_limit_seconds must be > 0, got {time_limit_seconds}.")
    if not 0 <= relative_gap < 1:
        raise PlanError(f"relative_gap must be in [0, 1), got {relative_gap}.")
    shape = problem.forward_score.shape
    if not 0 <= most_shortcut <= 1:
        raise PlanError(f"most_shortcut is a share of a device's heads in [0, 1], got {most_shortcut}.")
    start = time.monotonic()
    deadline, greedy_until = start + time_limit_seconds, start + _GREEDY_SHARE * time_limit_seconds
    knapsacks = device_knapsacks(problem, most_shortcut)
    _require_paid(problem, knapsacks)

    solutions = [_greedily(knapsack, greedy_until) for knapsack in knapsacks]
    waiting = sorted(range(len(knapsacks)), key=lambda index: solutions[index].missing)
    bound, missing = sum(each.bound for each in solutions), sum(each.missing for each in solutions)
    while waiting and missing > relative_gap * bound:
        its_deadline = share_of_time(deadline, len(waiting))
        index = waiting.pop()
        known = solutions[index]
        solutions[index] = better = _improved(knapsacks[index], known, its_deadline, relative_gap)
        bound, missing = bound + better.bound - known.bound, missing + better.missing - known.missing
    chosen = [solution.operations for solution in solutions]
    bound = sum(solution.bound for solution in solutions)
    status = _summary(dict(zip(problem.device_names, (s.status for s in solutions), strict=True)))

    score = sum(k.objective(operations) for k, operations in zip(knapsacks, chosen, strict=True))
    if bound - score <= relative_gap * bound:
        status = OPTIMAL
    operations = np.empty(problem.forward_score.size, dtype=np.uint8)
    for knapsack, its_operations in zip(knapsacks, chosen, strict=True):
        operations[knapsack.cells] = its_operations
    return plan_with_bound(problem, operations.reshape(shape), planner=JOINT.name, status=status, bound=bound)


def _require_paid(problem: PlanProblem, knapsacks: Sequence[Knapsack]) -> None:
    """Raise PlanError if a device's budgets do not pay for as many running heads as must run."""
    costs_of = {"compute": problem.compute_cost, "communication": problem.communication_cost}
    for index, knapsack in enumerate(knapsacks):
        need = knapsack.used(knapsack.raised_to_least(np.zeros(len(knapsack.cells), dtype=np.uint8)))
        for place, (resource, costs) in enumerate(costs_of.items()):
            if need[place] > knapsack.budget[place]:
                use = need[place] + len(knapsack.cells) * costs[Operation.SHORTCUT]
                raise PlanError(
                    f"The {resource} budget of {problem.device_names[index]} does not pay for the heads that "
                    f"most_shortcut makes run forward. The least feasible {resource} budget is "
                    f"{problem.least_budget(resource, index, use)} of its dense step; raise it or most_shortcut."
                )


def _greedily(knapsack: Knapsack, deadline: float) -> _Solution:
    """The greedy plan for a knapsack."""
    operations = greedy(knapsack, deadline=deadline)
    score = knapsack.objective(operations)
    status = "greedy: time limit" if time.monotonic() > deadline else "greedy"
    return _Solution(operations, score, max(upper_bound(knapsack, deadline), score), status)


def _improved(knapsack: Knapsack, known: _Solution, deadline: float, relative_gap: float) -> _Solution:
    """The better one of HiGHS's plan and the plan that is known already."""
    if known.missing <= relative_gap * known.bound:
        return replace(known, status=OPTIMAL)
    plan, solver_bound, status = _solve_with_highs(knapsack, deadline, relative_gap)
    bound = min(known.bound, solver_bound)
    if plan is not None:
        plan = greedy(knapsack, plan)
        score = knapsack.objective(plan)
        if score >= known.score:
            return _Solution(plan, score, bound, status)
    if status != OPTIMAL:
        status = f"greedy: {status}" if known.status == "greedy" else known.status
    return replace(known, bound=bound, status=status)


def _solve_with_highs(
    knapsack: Knapsack, deadline: float, relative_gap: float
) -> tuple[Operations | None, float, str]:
    """HiGHS's plan (None if it found none within the budgets), its bound, and how HiGHS ended."""
    cells = len(knapsack.cells)
    # Once the counts are whole numbers, the rest is a transportation problem, whose solutions are whole by
    # themselves: branching on two counts instead of on every cell. Memory and most_shortcut break that.
    cells_branch = math.isfinite(knapsack.memory) or bool(knapsack.least.any())
    is_integer = np.concatenate([np.full(2 * cells, cells_branch), np.ones(2, dtype=bool)])
    reason = reason_against(int(is_integer.sum()), deadline - time.monotonic())
    if reason:  # before the rows are made
        return None, math.inf, reason
    rows = _rows(knapsack)
    solution = maximise_integer(
        np.concatenate([knapsack.forward_gain, knapsack.backward_gain, np.zeros(2)]),
        rows,
        seconds=deadline - time.monotonic(),
        largest=np.concatenate([np.ones(2 * cells), np.full(2, float(cells))]),
        is_integer=is_integer,
        relative_gap=relative_gap,
    )
    if solution.values is None:
        return None, solution.bound, solution.status
    runs = np.rint(solution.values[: 2 * cells]).astype(np.uint8).reshape(2, cells)
    plan = np.where(runs[1], Operation.FULL, runs[0]).astype(np.uint8)
    within = (knapsack.used(plan) <= knapsack.budget).all()
    if not (within and knapsack.fits_memory(plan) and knapsack.runs_enough(plan)):
        return None, solution.bound, "HiGHS's plan breaks a budget"
    return plan, solution.bound, solution.status


def _rows(knapsack: Knapsack) -> Rows:
    """The constraints on variables forward[cell] (the cell runs), backward[cell] (it runs FULL), and how many run and
    how many run FULL: forward >= backward; the sums; the limited budgets; memory; how many must run.
    """
    count = len(knapsack.cells)
    every, ones, totals = np.arange(count), np.ones(count), 2 * len(knapsack.cells) + np.arange(2)
    no_limit = np.full(count, -math.inf)
    # Of each kind: rows, counted from 0, columns and values of the entries; lower and upper of the rows.
    kinds = [
        (np.tile(every, 2), np.arange(2 * count), np.repeat([-1.0, 1.0], count), no_limit, np.zeros(count))
    ]

    def add_sum(columns: Ints, values: Floats, least: float, most: float) -> None:
        kinds.append((np.zeros_like(columns), columns, values, np.array([least]), np.array([most])))

    for total, columns in zip(totals, (every, every + count), strict=True):
        add_sum(np.append(columns, total), np.append(ones, -1.0), 0.0, 0.0)
    for resource in np.flatnonzero(np.isfinite(knapsack.budget)):
        steps = np.array([knapsack.forward_step[resource], knapsack.backward_step[resource]])
        if (steps > 0).any():
            add_sum(totals[steps > 0], steps[steps > 0], -math.inf, float(knapsack.budget[resource]))
    if math.isfinite(knapsack.memory) and count:
        of_row = np.unique(knapsack.row, return_inverse=True)[1]
        rows = int(of_row.max()) + 1
        kinds.append((of_row, every + count, ones, no_limit[:rows], np.full(rows, knapsack.memory)))
    if knapsack.least.any():
        least = knapsack.least.astype(np.float64)
        kinds.append((knapsack.group, every, ones, least, np.full(len(least), math.inf)))
    first = np.cumsum([0, *(len(lower) for *_, lower, _ in kinds[:-1])])
    entries = [len(columns) for _, columns, *_ in kinds]
    row, column, value, lower, upper = (np.concatenate(parts) for parts in zip(*kinds, strict=True))
    return Rows(row + np.repeat(first, entries), column, value, lower, upper)


def _summary(statuses: dict[str, str]) -> str:
    """One status for all devices: the common one, or each that is not "optimal" with its devices."""
    if len(set(statuses.values())) == 1:
        return next(iter(statuses.values()))
    devices: dict[str, list[str]] = {}
    for device, status in statuses.items():
        if status != OPTIMAL:
            devices.setdefault(status, []).append(device)
    return "; ".join(
        f"{status} ({', '.join(names) if len(names) <= _NAMES else f'{len(names)} of {len(statuses)} devices'})"
        for status, names in devices.items()
    )


JOINT = Planner(
    "joint",
    "both levels at once: the best score within every device's own budgets",
    solve_joint,
    WithShortcuts,
    fits_memory=True,
)
