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


def families(knapsacks: Sequence[Knapsack], demand: Coverage) -> list[list[int]]:
    """Those that hold the same subnets, in other rows: one rank of one stage in all replicas. No others share any."""
    found: dict[bytes, list[int]] = {}
    for index, knapsack in enumerate(knapsacks):
        if len(knapsack.cells):
            found.setdefault(np.unique(knapsack.cells % demand.subnets).tobytes(), []).append(index)
    return list(found.values())


def most_full(knapsack: Knapsack, budget: Floats | None = None, memory: float | None = None) -> int:
    """How many FULL cells a budget float64 [2] and a memory pay for, beside the cells that must run (by default the
    knapsack's own)."""
    budget = knapsack.budget if budget is None else budget
    memory = knapsack.memory if memory is None else memory
    must = int(knapsack.least.sum())
    most = [float(np.minimum(np.bincount(knapsack.row), memory).sum())]
    for left, forward, backward in zip(budget, knapsack.forward_step, knapsack.backward_step, strict=True):
        if forward + backward > 0 and left < math.inf:
            count = left / (forward + backward)
            if count < must:
                count = (
                    (left - must * forward) / backward
                    if backward > 0
                    else (must if left >= must * forward else 0)
                )
            most.append(max(count, 0.0))
    return int(min(most))


def is_possible(knapsacks: Sequence[Knapsack], most: Sequence[int], demand: Coverage) -> bool:
    """Whether `most` [knapsack] FULL cells are enough for the demand. They are if there is a plan, and unless some
    cells must run besides, there is a plan if they are: the rows of a subnet can always be dealt out (`cover`)."""
    return all(
        sum(most[index] for index in family)
        >= demand.rows * len(np.unique(knapsacks[family[0]].cells % demand.subnets))
        for family in families(knapsacks, demand)
    )


@dataclass(frozen=True, eq=False)
class CoveragePrice:
    """bound: no plan that meets the demand scores more. loss: for each knapsack float64 [cell], what it costs that the
    cell is FULL, if compute has the price at which `bound` is least."""

    bound: float
    loss: list[Floats]


def price_coverage(knapsacks: Sequence[Knapsack], demand: Coverage) -> CoveragePrice:
    """At a price of compute every cell does what is worth most, and every subnet makes the rows FULL that lose least by
    it; that and the worth of the budgets is a bound at any price (the other budgets cut off nothing here)."""
    bound = 0.0
    loss: list[Floats] = [np.zeros(len(knapsack.cells)) for knapsack in knapsacks]
    for family in families(knapsacks, demand):
        part = _price_together([knapsacks[index] for index in family], demand)
        bound += part.bound
        for index, its_loss in zip(family, part.loss, strict=True):
            loss[index] = its_loss
    return CoveragePrice(bound, loss)


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
    knapsacks: Sequence[Knapsack], demand: Coverage, loss: Sequence[Floats] | None = None
) -> list[npt.NDArray[np.uint8]]:
    """FULL cells, the others SHORTCUT, that meet a demand that is possible (`is_possible`) within budgets and memory.

    loss: for each knapsack float64 [cell], which cells are better left; None: the FULL cells of each block are spread
        evenly over the rows.

    Every row of a family first gets a number of FULL cells, as near as may be to what its subnets would like. Then the
    subnets take their rows one after the other, those first that care most. A row with as many places left as there
    are subnets to come is taken by all of them; so the numbers always come out.
    """
    plan = [np.full(len(knapsack.cells), Operation.SHORTCUT, dtype=np.uint8) for knapsack in knapsacks]
    for family in families(knapsacks, demand):
        subnets = len(np.unique(knapsacks[family[0]].cells % demand.subnets))
        rows = [len(knapsacks[index].cells) // subnets for index in family]
        lost = np.zeros((sum(rows), subnets))
        if loss is not None:
            lost = np.concatenate([loss[index].reshape(-1, subnets) for index in family])
        wanted = np.bincount(
            np.argsort(lost, axis=0, kind="stable")[: demand.rows].ravel(), minlength=sum(rows)
        )
        if loss is None:
            wanted[:] = 0
        places = _places([knapsacks[index] for index in family], rows, wanted, demand.rows * subnets)
        order = np.arange(subnets) if loss is None else np.argsort(-np.ptp(lost, axis=0), kind="stable")
        full = np.zeros(lost.shape, dtype=bool)
        for taken, subnet in enumerate(order):
            key = np.where(places > 0, lost[:, subnet] if loss is not None else -places, np.inf)
            key[places == subnets - taken] = -np.inf
            chosen = np.argsort(key, kind="stable")[: demand.rows]
            full[chosen, subnet] = True
            places[chosen] -= 1
        for index, its_full in zip(family, np.split(full, np.cumsum(rows)[:-1]), strict=True):
            plan[index][its_full.ravel()] = Operation.FULL
    return plan


def _places(family: Sequence[Knapsack], rows: Sequence[int], wanted: Ints, total: int) -> Ints:
    """FULL cells of every row of a family, int64 [row], `total` in all and as near to `wanted` as budgets allow."""
    device = np.repeat(np.arange(len(family)), rows)
    cells = np.concatenate(
        [np.full(count, len(k.cells) // count) for k, count in zip(family, rows, strict=True)]
    )
    memory = np.minimum(cells, np.array([min(k.memory, len(k.cells)) for k in family])[device]).astype(
        np.int64
    )
    places = np.minimum(wanted, memory)
    most = np.array([most_full(knapsack) for knapsack in family])
    of_device = np.minimum(np.bincount(device, places), most).astype(np.int64)
    of_device = _levelled(of_device, most, total)
    for index, its_total in enumerate(of_device):
        mine = device == index
        if places[mine].sum() > its_total:
            places[mine] = _levelled(np.zeros_like(places[mine]), places[mine], int(its_total))
        else:
            places[mine] = _levelled(places[mine], memory[mine], int(its_total))
    return np.asarray(places)


def _levelled(value: Ints, most: Ints, total: int) -> Ints:
    """Whole numbers int64 [entry] raised from the lowest up, at most to `most`, until they add up to `total`."""
    low, high = 0, int(most.max(initial=0))
    while low < high:  # the highest level that is not too much
        level = (low + high + 1) // 2
        low, high = (
            (level, high) if np.maximum(value, np.minimum(level, most)).sum() <= total else (low, level - 1)
        )
    raised = np.asarray(np.maximum(value, np.minimum(low, most)))
    room = np.flatnonzero((raised <= low) & (raised < most))
    raised[room[: total - int(raised.sum())]] += 1
    return np.asarray(raised)


def least_budget_for(problem: PlanProblem, knapsacks: Sequence[Knapsack], demand: Coverage) -> str:
    """Which budget to raise so that the demand can be met, and to what share of the dense step."""
    costs = np.array([problem.compute_cost, problem.communication_cost])
    dense = problem.cells_per_device()[:, None] * costs[:, Operation.FULL]
    shortcut = problem.cells_per_device()[:, None] * costs[:, Operation.SHORTCUT]
    in_row = problem.cells_per_device() / (problem.forward_score.shape[0] // problem.replicas)
    for column, name in enumerate(("compute", "communication", "memory")):

        def is_enough(step: int, column: int = column) -> bool:
            """Whether coverage is possible with step / 10000 of the dense step, the other budgets as they are."""
            share = step / 10_000
            budget, memory = problem.budgets(), problem.memory_budget
            if column == 0:
                share = max(0.0, share - problem.always_share) / (1 - problem.always_share)
            if column == 2:
                memory = np.maximum(memory, np.floor(share * in_row + BUDGET_EPSILON))
            else:
                share += BUDGET_EPSILON / 2
                budget[:, column] = np.maximum(budget[:, column], dense[:, column] * share)
            most = [most_full(*each) for each in zip(knapsacks, budget - shortcut, memory, strict=True)]
            return is_possible(knapsacks, most, demand)

        if is_enough(10_000):
            least = bisect_left(range(10_000), True, key=is_enough) / 10_000
            return (
                f"The least feasible {name} budget is {least:g} of the dense step's on every device; "
                f"raise it or lower the coverage."
            )
    scarce = [
        name
        for name, budget in (
            ("compute", problem.compute_budget),
            ("communication", problem.communication_budget),
            ("memory", problem.memory_budget),
        )
        if np.isfinite(budget).any()
    ]
    return f"Raise both the {' and the '.join(scarce)} budget, or lower the coverage."
