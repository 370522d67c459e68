"""Coverage for knapsacks: the least number of FULL rows that every head gets in a batch, over all devices."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


def cover(
    knapsacks: Sequence[Knapsack], capacity: Ints, demand: Coverage
) -> list[npt.NDArray[np.uint8]] | None:
    """FULL cells, the others SHORTCUT, that meet the demand with at most `capacity` int64 [knapsack] in each.

    Takes the cell with the largest gain on the device with the most room. If every device has equally many
    rows of every subnet (data parallel), this finds a way wherever there is one; if not it may return None.
    """
    plan = [np.full(len(knapsack.cells), Operation.SHORTCUT, dtype=np.uint8) for knapsack in knapsacks]
    waiting: list[list[list[int]]] = []  # [knapsack][subnet]: its cells, the best last
    for knapsack in knapsacks:
        queues: list[list[int]] = [[] for _ in range(demand.subnets)]
        for cell in np.argsort(knapsack.forward_gain + knapsack.backward_gain, kind="stable"):
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
