"""The optimal planner: both levels of the knapsack at once, as a mixed-integer program that HiGHS proves."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.bounds import plan_with_bound, upper_bound
from d2ft_hpc.planning.choose import share_of_time
from d2ft_hpc.planning.greedy import greedy
from d2ft_hpc.planning.highs import INFEASIBLE, OPTIMAL, Rows, maximise_integer, reason_against
from d2ft_hpc.planning.joint_coverage import (
    Coverage,
    cover,
    covers,
    is_possible,
    least_budget_for,
    most_full,
    price_coverage,
)
from d2ft_hpc.planning.knapsack import Ints, Knapsack, device_knapsacks
from d2ft_hpc.planning.options import WithCoverage, WithShortcuts
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.planner import Planner
from d2ft_hpc.planning.prices import RELATIVE_GAP
from d2ft_hpc.planning.problem import Floats, PlanProblem, round_up

Operations = npt.NDArray[np.uint8]

_NAMES = 3  # of devices that one status may name

_GREEDY_SHARE = (
    2 / 3
)  # of the time, after which the devices that are left get a quicker plan than the greedy one


@dataclass(frozen=True, eq=False)
class _Solution:
    """Operations uint8 [cell] for each knapsack (an empty list if none were found), their score, a bound on what any
    could score, and how it ended."""

    operations: list[Operations]
    score: float
    bound: float
    status: str

    @property
    def missing(self) -> float:
        return self.bound - self.score


def solve_joint(
    problem: PlanProblem,
    *,
    forward_weight: float = 1.0,
    backward_weight: float = 1.0,
    time_limit_seconds: float = 10.0,
    relative_gap: float = RELATIVE_GAP,
    coverage: int = 0,
    most_shortcut: float = 1.0,
) -> SkipPlan:
    """Maximise forward_weight * (forward score of all cells that run) + backward_weight * (backward score of
    the FULL ones) under every device's budgets; scores are divided by their means (`PlanProblem.gains`).

    time_limit_seconds: wall-clock time for all devices together.
    relative_gap: a plan that is proved to be this near its optimum is good enough, in [0, 1).
    coverage: least number of FULL rows that every (block, head) gets over the whole batch; 0 = no demand.
    most_shortcut: share in [0, 1] of a device's heads in a (row, block) that may be SHORTCUT.

    Without coverage the devices share nothing: each is solved by itself and the bounds add up. Coverage may
    couple them: if the devices' own plans do not happen to meet it, all of them are solved together.
    Where HiGHS runs out of time or fails, the greedy plan takes its place if it is the better one: the
    status is then "greedy: <reason>" and the bound still holds. Where time does not even do for that, a device runs
    the cells that gain most. The same problem gives the same plan, unless time runs out.

    Raises PlanError if an option is out of range, or if the budgets cannot pay for the coverage or for `most_shortcut`
    (the message states the least feasible budget).
    """
    if not time_limit_seconds > 0:
        raise PlanError(f"time_limit_seconds must be > 0, got {time_limit_seconds}.")
    if not 0 <= relative_gap < 1:
        raise PlanError(f"relative_gap must be in [0, 1), got {relative_gap}.")
    shape = problem.forward_score.shape
    if not 0 <= coverage <= shape[0]:
        raise PlanError(f"coverage must be from 0 to the number of rows, {shape[0]}, got {coverage}.")
    if not 0 <= most_shortcut <= 1:
        raise PlanError(f"most_shortcut is a share of a device's heads in [0, 1], got {most_shortcut}.")
    start = time.monotonic()
    deadline, greedy_until = start + time_limit_seconds, start + _GREEDY_SHARE * time_limit_seconds
    knapsacks = device_knapsacks(problem, forward_weight, backward_weight, most_shortcut)
    _require_paid(problem, knapsacks)

    solutions = [_greedily(knapsack, greedy_until) for knapsack in knapsacks]
    waiting = sorted(range(len(knapsacks)), key=lambda index: solutions[index].missing)
    while waiting and not _is_near(solutions, relative_gap):
        its_deadline = share_of_time(deadline, len(waiting))
        index = waiting.pop()
        solutions[index] = _improved([knapsacks[index]], solutions[index], its_deadline, relative_gap)
    chosen = [solution.operations[0] for solution in solutions]
    bound = sum(solution.bound for solution in solutions)
    status = _summary(dict(zip(problem.device_names, (s.status for s in solutions), strict=True)))

    demand = Coverage(coverage, shape[1] * shape[2])
    if not covers(knapsacks, chosen, demand):
        if not is_possible(knapsacks, [most_full(knapsack) for knapsack in knapsacks], demand):
            raise PlanError(
                f"No plan within the budgets gives every block and head {coverage} FULL rows (coverage). "
                f"{least_budget_for(problem, knapsacks, demand)}"
            )
        try:
            known = _greedily_covered(knapsacks, demand, bound, greedy_until)
            solution = _improved(knapsacks, known, deadline, relative_gap, demand)
        except _NothingFoundError as error:
            raise PlanError(
                f"No plan was found that gives every block and head {coverage} FULL rows (coverage) and keeps "
                f"most_shortcut {most_shortcut:g} within the budgets: {error}. Raise the budgets or most_shortcut, or "
                f"lower the coverage."
            ) from error
        chosen, status = solution.operations, solution.status
        bound = min(bound, solution.bound)

    score = _objective(knapsacks, chosen)
    if bound - score <= relative_gap * bound:
        status = OPTIMAL
    operations = np.empty(problem.forward_score.size, dtype=np.uint8)
    for knapsack, its_operations in zip(knapsacks, chosen, strict=True):
        operations[knapsack.cells] = its_operations
    return plan_with_bound(
        problem,
        operations.reshape(shape),
        planner=JOINT.name,
        status=status,
        forward_weight=forward_weight,
        backward_weight=backward_weight,
        bound=bound,
    )


def _require_paid(problem: PlanProblem, knapsacks: Sequence[Knapsack]) -> None:
    """Raise PlanError if a device's budgets do not pay for as many running heads as must run."""
    cells = problem.cells_per_device()
    for index, knapsack in enumerate(knapsacks):
        need = knapsack.used(knapsack.raised_to_least(np.zeros(len(knapsack.cells), dtype=np.uint8)))
        for resource, costs, always_share in (
            ("compute", problem.compute_cost, problem.always_share),
            ("communication", problem.communication_cost, 0.0),
        ):
            place = int(resource == "communication")
            if need[place] > knapsack.budget[place]:
                used = need[place] + cells[index] * costs[Operation.SHORTCUT]
                least = always_share + (1 - always_share) * used / (cells[index] * costs[Operation.FULL])
                raise PlanError(
                    f"The {resource} budget of {problem.device_names[index]} does not pay for the heads that "
                    f"most_shortcut makes run forward. The least feasible {resource} budget is {round_up(least):g} of "
                    f"its dense step; raise it or most_shortcut."
                )


class _NothingFoundError(Exception):
    """No plan that keeps both coverage and most_shortcut; the text says whether there is none."""


def _is_near(solutions: Sequence[_Solution], relative_gap: float) -> bool:
    """Whether all solutions together are proved to be near enough to the optimum."""
    bound = sum(solution.bound for solution in solutions)
    return sum(solution.missing for solution in solutions) <= relative_gap * bound


def _greedily(knapsack: Knapsack, deadline: float) -> _Solution:
    """The greedy plan for a knapsack."""
    operations = greedy(knapsack, deadline=deadline)
    score = knapsack.objective(operations)
    return _Solution(
        [operations], score, max(upper_bound(knapsack, deadline), score), _greedy_until(deadline)
    )


def _greedily_covered(
    knapsacks: Sequence[Knapsack], demand: Coverage, bound: float, deadline: float
) -> _Solution:
    """The greedy plan for knapsacks that a demand couples. bound: on plans that need not meet it."""
    plan = _covered(knapsacks, demand, [None], deadline) if time.monotonic() > deadline else []
    if not plan:
        priced = price_coverage(knapsacks, demand)
        plan, bound = _covered(knapsacks, demand, [priced.loss, None], deadline), min(bound, priced.bound)
    score = _objective(knapsacks, plan) if plan else -math.inf
    return _Solution(plan, score, max(bound, score), _greedy_until(deadline))


def _greedy_until(deadline: float) -> str:
    return "greedy: time limit" if time.monotonic() > deadline else "greedy"


def _reason(known: str, of_highs: str) -> str:
    return f"greedy: {of_highs}" if known == "greedy" else known


def _improved(
    knapsacks: Sequence[Knapsack],
    known: _Solution,
    deadline: float,
    relative_gap: float,
    demand: Coverage | None = None,
) -> _Solution:
    """The better of HiGHS's plan and the one that is known."""
    if _is_near([known], relative_gap):
        return replace(known, status=OPTIMAL)
    plan, solver_bound, status = _solve_with_highs(knapsacks, deadline, relative_gap, demand)
    bound = min(known.bound, solver_bound)
    if plan is not None:
        plan = [greedy(knapsack, start) for knapsack, start in zip(knapsacks, plan, strict=True)]
        score = _objective(knapsacks, plan)
        if score >= known.score:
            return _Solution(plan, score, bound, status)
    if not known.operations:
        raise _NothingFoundError("there is none" if status == INFEASIBLE else f"there may be one ({status})")
    return replace(known, bound=bound, status=OPTIMAL if status == OPTIMAL else _reason(known.status, status))


def _solve_with_highs(
    knapsacks: Sequence[Knapsack], deadline: float, relative_gap: float, demand: Coverage | None
) -> tuple[list[Operations] | None, float, str]:
    """HiGHS's plan (None if it has none that keeps the budgets), its bound, and how it ended."""
    counts = np.repeat([float(len(knapsack.cells)) for knapsack in knapsacks], 2)
    cells = int(counts.sum()) // 2
    gains = [knapsack.forward_gain for knapsack in knapsacks] + [
        knapsack.backward_gain for knapsack in knapsacks
    ]
    # Once the counts are whole numbers, the rest is a transportation problem, whose solutions are whole by
    # themselves: branching on two counts a device instead of on every cell. Memory, coverage and most_shortcut
    # break that.
    cells_branch = demand is not None or any(math.isfinite(k.memory) or k.least.any() for k in knapsacks)
    is_integer = np.concatenate([np.full(2 * cells, cells_branch), np.ones(len(counts), dtype=bool)])
    reason = reason_against(int(is_integer.sum()), deadline - time.monotonic())
    if reason:  # before the rows are made
        return None, math.inf, reason
    rows = _rows(knapsacks, demand)
    solution = maximise_integer(
        np.concatenate([*gains, np.zeros(len(counts))]),
        rows,
        seconds=deadline - time.monotonic(),
        largest=np.concatenate([np.ones(2 * cells), counts]),
        is_integer=is_integer,
        relative_gap=relative_gap,
    )
    if solution.values is None:
        return None, solution.bound, solution.status
    runs = np.rint(solution.values[: 2 * cells]).astype(np.uint8).reshape(2, cells)
    ends = np.cumsum([len(knapsack.cells) for knapsack in knapsacks])[:-1]
    plan = np.split(np.where(runs[1], Operation.FULL, runs[0]).astype(np.uint8), ends)
    within = all(
        (k.used(operations) <= k.budget).all() and k.fits_memory(operations) and k.runs_enough(operations)
        for k, operations in zip(knapsacks, plan, strict=True)
    )
    if not within or not covers(knapsacks, plan, demand):
        return None, solution.bound, "HiGHS's plan breaks a budget"
    return plan, solution.bound, solution.status


def _rows(knapsacks: Sequence[Knapsack], demand: Coverage | None) -> Rows:
    """The constraints on variables forward[cell] (the cell runs), backward[cell] (it runs FULL), cells in the order
    of the knapsacks, and for each knapsack how many run and how many run FULL: forward >= backward; the sums;
    the limited budgets; memory; the demand for each subnet.
    """
    cells = np.concatenate([knapsack.cells for knapsack in knapsacks])
    count = len(cells)
    every = np.arange(count)
    row, column = [every, every], [every, every + count]
    value, upper = [np.full(count, -1.0), np.ones(count)], [np.zeros(count)]  # backward - forward <= 0
    lower = [np.full(count, -math.inf)]
    rows = count

    def add(columns: Ints, values: Floats, least: float, most: float) -> None:
        nonlocal rows
        row.append(np.full(len(columns), rows))
        column.append(columns)
        value.append(values)
        lower.append(np.array([least]))
        upper.append(np.array([most]))
        rows += 1

    first = 0
    for index, knapsack in enumerate(knapsacks):
        own = np.arange(first, first + len(knapsack.cells))
        first += len(own)
        totals = 2 * count + 2 * index + np.arange(2)
        for total, columns in zip(totals, (own, own + count), strict=True):
            add(np.append(columns, total), np.append(np.ones(len(own)), -1.0), 0.0, 0.0)
        for resource in np.flatnonzero(np.isfinite(knapsack.budget)):
            steps = np.array([knapsack.forward_step[resource], knapsack.backward_step[resource]])
            if (steps > 0).any():
                add(totals[steps > 0], steps[steps > 0], -math.inf, float(knapsack.budget[resource]))
        if math.isfinite(knapsack.memory) and len(own):
            of_row = np.unique(knapsack.row, return_inverse=True)[1]
            row.append(rows + of_row)
            column.append(own + count)
            value.append(np.ones(len(own)))
            upper.append(np.full(of_row.max() + 1, knapsack.memory))
            lower.append(np.full(of_row.max() + 1, -math.inf))
            rows += int(of_row.max()) + 1
        if knapsack.least.any():
            row.append(rows + knapsack.group)
            column.append(own)
            value.append(np.ones(len(own)))
            upper.append(np.full(len(knapsack.least), math.inf))
            lower.append(knapsack.least.astype(np.float64))
            rows += len(knapsack.least)
    if demand is not None:
        row.append(rows + cells % demand.subnets)
        column.append(every + count)
        value.append(np.full(count, -1.0))
        upper.append(np.full(demand.subnets, -float(demand.rows)))
        lower.append(np.full(demand.subnets, -math.inf))
        rows += demand.subnets
    return Rows(
        np.concatenate(row),
        np.concatenate(column),
        np.concatenate(value),
        lower=np.concatenate(lower),
        upper=np.concatenate(upper),
    )


def _objective(knapsacks: Sequence[Knapsack], plan: Sequence[Operations]) -> float:
    return sum(k.objective(operations) for k, operations in zip(knapsacks, plan, strict=True))


def _covered(
    knapsacks: Sequence[Knapsack],
    demand: Coverage,
    losses: Sequence[Sequence[Floats] | None],
    deadline: float,
) -> list[Operations]:
    """The greedy plan on the first cover that the budgets pay for beside what must run, of covers for these losses
    (`cover`); an empty list if there is none."""
    for its_loss in losses:
        start = cover(knapsacks, demand, its_loss)
        if all(
            (k.used(k.raised_to_least(its_start)) <= k.budget).all()
            for k, its_start in zip(knapsacks, start, strict=True)
        ):
            return [greedy(k, its_start, deadline) for k, its_start in zip(knapsacks, start, strict=True)]
    return []


def _summary(statuses: dict[str, str]) -> str:
    """One status for all devices: the common one, or those that are not optimal with their devices."""
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


class JointOptions(WithShortcuts, WithCoverage):
    """Of the optimal planner."""


JOINT = Planner(
    "joint",
    "both levels at once: the best score within every device's own budgets",
    solve_joint,
    JointOptions,
    fits_memory=True,
)
