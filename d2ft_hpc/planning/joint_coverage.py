"""Coverage for knapsacks: the least number of FULL rows that every head gets in a batch, over all devices."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from d2ft_hpc.planning.knapsack import Ints, Knapsack
from d2ft_hpc.planning.plan import Operation
from d2ft_hpc.planning.problem import BUDGET_EPSILON, Floats, PlanProblem


@dataclass(frozen=True)
class Coverage:
    """Every subnet has at least `rows` FULL rows. A cell's subnet is its flat index modulo `subnets`."""

    rows: int
    subnets: int


def covers(
    knapsacks: Sequence[Knapsack], plan: Sequence[npt.NDArray[np.uint8]], demand: Coverage | None
) -> bool:
    """Whether operations uint8 [cell] for each knapsack meet the demand."""
    if demand is None:
        return True
    full = [k.cells[operations == Operation.FULL] for k, operations in zip(knapsacks, plan, strict=True)]
    rows = np.bincount(np.concatenate(full) % demand.subnets, minlength=demand.subnets)
    return bool((rows >= demand.rows).all())


def most_full(knapsack: Knapsack, budget: Floats) -> int:
    """How many FULL cells, the rest SHORTCUT, a budget float64 [2] pays for."""
    step = knapsack.forward_step + knapsack.backward_step
    affordable = [left / cost for left, cost in zip(budget, step, strict=True) if cost > 0]
    return int(min([len(knapsack.cells), *affordable]))


@dataclass(frozen=True, eq=False)
class CoveragePrice:
    """bound: no plan that meets the demand scores more. loss: for each knapsack float64 [cell], what it costs that the
    cell is FULL, if compute has the price at which `bound` is least."""

    bound: float
    loss: list[Floats]


def price_coverage(knapsacks: Sequence[Knapsack], demand: Coverage) -> CoveragePrice:
    """At a price of compute every cell does what is worth most, and every subnet makes the rows FULL that lose least by
    it; that and the worth of the budgets is a bound at any price (the other budgets cut off nothing here)."""
    if not _shares_subnets(knapsacks, demand):
        parts = [_price_together([knapsack], demand) for knapsack in knapsacks]
        return CoveragePrice(sum(part.bound for part in parts), [part.loss[0] for part in parts])
    return _price_together(knapsacks, demand)


def _shares_subnets(knapsacks: Sequence[Knapsack], demand: Coverage) -> bool:
    held = [np.unique(knapsack.cells % demand.subnets) for knapsack in knapsacks]
    return len(np.unique(np.concatenate(held))) < sum(map(len, held))


def _price_together(knapsacks: Sequence[Knapsack], demand: Coverage) -> CoveragePrice:
    """For knapsacks that share subnets, with one price for all of them."""
    forward_gain = np.concatenate([knapsack.forward_gain for knapsack in knapsacks])
    both_gain = forward_gain + np.concatenate([knapsack.backward_gain for knapsack in knapsacks])
    subnet = np.concatenate([knapsack.cells for knapsack in knapsacks]) % demand.subnets
    ends = np.cumsum([len(knapsack.cells) for knapsack in knapsacks])[:-1]
    forward_step = float(knapsacks[0].forward_step[0])
    both_step = forward_step + float(knapsacks[0].backward_step[0])
    budget = float(sum(knapsack.budget[0] for knapsack in knapsacks))

    def best_and_loss(price: float) -> tuple[float, Floats]:
        if_full = both_gain - price * both_step
        best = np.maximum(np.maximum(forward_gain - price * forward_step, if_full), 0.0)
        return float(best.sum()), best - if_full

    by_subnet = np.argsort(subnet, kind="stable")
    rows = np.bincount(subnet)
    rows = rows[rows > 0]
    is_even = len(rows) > 0 and rows.min() == rows.max() >= demand.rows > 0

    def bound_at(price: float) -> float:
        best, loss = best_and_loss(price)
        least = 0.0
        if is_even:  # of every subnet's losses, the smallest
            table = np.partition(loss[by_subnet].reshape(len(rows), -1), demand.rows - 1, axis=1)
            least = float(table[:, : demand.rows].sum())
        return best - least + (price * budget if price > 0 else 0.0)

    price = 0.0
    if math.isfinite(budget) and both_step > 0 and len(both_gain):
        highest = float(both_gain.max()) / min(step for step in (forward_step, both_step) if step > 0)
        price = float(minimize_scalar(bound_at, bounds=(0.0, highest), method="bounded").x)
    return CoveragePrice(bound_at(price), np.split(best_and_loss(price)[1], ends))


def cover(
    knapsacks: Sequence[Knapsack], capacity: Ints, demand: Coverage, loss: Sequence[Floats] | None = None
) -> list[npt.NDArray[np.uint8]] | None:
    """FULL cells, the others SHORTCUT, that meet the demand with at most `capacity` int64 [knapsack] in each.

    Takes the cell with the least loss (if None: with the largest gain) on the device with the most room. If every
    device has equally many rows of every subnet (data parallel), this finds a way wherever there is one; if not it may
    return None.
    """
    plan = [np.full(len(knapsack.cells), Operation.SHORTCUT, dtype=np.uint8) for knapsack in knapsacks]
    waiting: list[list[list[int]]] = []  # [knapsack][subnet]: its cells, the best last
    for index, knapsack in enumerate(knapsacks):
        queues: list[list[int]] = [[] for _ in range(demand.subnets)]
        worth = knapsack.forward_gain + knapsack.backward_gain if loss is None else -loss[index]
        for cell in np.argsort(worth, kind="stable"):
            queues[knapsack.cells[cell] % demand.subnets].append(int(cell))
        waiting.append(queues)
    room = capacity.copy()
    for subnet in range(demand.subnets):
        for _ in range(demand.rows):
            having = [index for index in range(len(knapsacks)) if room[index] > 0 and waiting[index][subnet]]
            if not having:
                return None
            index = max(having, key=lambda index: int(room[index]))
            plan[index][waiting[index][subnet].pop()] = Operation.FULL
            room[index] -= 1
    return plan


def is_even(knapsacks: Sequence[Knapsack], demand: Coverage) -> bool:
    """Whether every device has equally many rows of every subnet, as in data parallel."""
    rows = [np.bincount(knapsack.cells % demand.subnets, minlength=demand.subnets) for knapsack in knapsacks]
    return all(its_rows.min() == its_rows.max() for its_rows in rows)


def least_budget_for(problem: PlanProblem, knapsacks: Sequence[Knapsack], demand: Coverage) -> str:
    """Which budget to raise so that the demand can be met, and to what share of the dense step."""
    costs = np.array([problem.compute_cost, problem.communication_cost])
    dense = problem.cells_per_device()[:, None] * costs[:, Operation.FULL]
    shortcut = problem.cells_per_device()[:, None] * costs[:, Operation.SHORTCUT]
    for column, (name, always_share) in enumerate(
        (("compute", problem.always_share), ("communication", 0.0))
    ):

        def is_enough(step: int, column: int = column, always_share: float = always_share) -> bool:
            """Whether coverage is possible with step / 10000 of the dense step, the other budget as it is."""
            share = max(0.0, step / 10_000 - always_share) / (1 - always_share) + BUDGET_EPSILON / 2
            raised = problem.budgets()
            raised[:, column] = np.maximum(raised[:, column], dense[:, column] * share)
            capacity = map(most_full, knapsacks, raised - shortcut)
            return cover(knapsacks, np.array(list(capacity)), demand) is not None

        if is_enough(10_000):
            least = bisect_left(range(10_000), True, key=is_enough) / 10_000
            return (
                f"The least feasible {name} budget is {least:g} of the dense step's on every device; "
                f"raise it or lower the coverage."
            )
    return "Raise both the compute and the communication budget, or lower the coverage."
