"""One device's knapsack: its gains, the costs of a step up from SHORTCUT, and the order of steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from d2ft_hpc.planning.arrays import Flags, Floats, Ints, Operations
from d2ft_hpc.planning.plan import Operation
from d2ft_hpc.planning.problem import PlanProblem

_ROUNDING = 1e-12  # by which sums of the same costs in another order may differ


@dataclass(frozen=True, eq=False)
class Knapsack:
    """One device's part of a problem, measured from "every cell SHORTCUT".

    cells: int64 [cell], flat indices into [row, block, head].
    forward_gain, backward_gain: float64 [cell], for running forward, and for running backward on top.
    forward_step, backward_step: float64 [2], what SHORTCUT -> FORWARD_ONLY and FORWARD_ONLY -> FULL add in
        compute and communication.
    budget: float64 [2], the most that whole steps can use of what is left for them; inf = no limit.
    row: int64 [cell], the cell's row. memory: most FULL cells of one row; inf = no limit.
    group: int64 [cell], numbers the (row, block) that the cell belongs to. least: int64 [group], how many of its cells
        run at least; zeros = no demand.
    """

    cells: Ints
    forward_gain: Floats
    backward_gain: Floats
    forward_step: Floats
    backward_step: Floats
    budget: Floats
    row: Ints
    memory: float
    group: Ints
    least: Ints

    @cached_property
    def rows(self) -> int:
        """Number of rows, which hold equally many cells."""
        return len(np.unique(self.row))

    def runs_enough(self, operations: Operations) -> bool:
        """Whether operations uint8 [cell] run at least `least` cells of every (row, block)."""
        return bool((self._running(operations) >= self.least).all())

    def raised_to_least(self, operations: Operations) -> Operations:
        """The operations uint8 [cell]; where too few cells run, those that gain most by it become FORWARD_ONLY."""
        missing = self.least - self._running(operations)
        if (missing <= 0).all():
            return operations
        is_idle = operations == Operation.SHORTCUT
        order = np.lexsort((-self.backward_gain, -self.forward_gain, ~is_idle, self.group))
        group = self.group[order]
        place = np.arange(len(group)) - np.searchsorted(group, group)
        raised: Operations = operations.copy()
        raised[order[place < missing[group]]] = Operation.FORWARD_ONLY
        return raised

    def _running(self, operations: Operations) -> Ints:
        return np.bincount(self.group[operations >= Operation.FORWARD_ONLY], minlength=len(self.least))

    def fits_memory(self, operations: Operations) -> bool:
        """Whether no row of operations uint8 [cell] has more FULL cells than the memory holds."""
        return bool(np.bincount(self.row[operations == Operation.FULL]).max(initial=0) <= self.memory)

    def used(self, operations: Operations) -> Floats:
        """Compute and communication of operations uint8 [cell], float64 [2]."""
        forward = np.count_nonzero(operations >= Operation.FORWARD_ONLY)
        backward = np.count_nonzero(operations == Operation.FULL)
        return np.asarray(forward * self.forward_step + backward * self.backward_step)

    def objective(self, operations: Operations) -> float:
        return float(
            self.forward_gain[operations >= Operation.FORWARD_ONLY].sum()
            + self.backward_gain[operations == Operation.FULL].sum()
        )

    def prices(self) -> Iterator[Floats]:
        """Ways to weigh compute against communication, float64 [2]: each alone, then both by scarcity.

        Any weighting of the two budgets gives a knapsack with one budget, and with it a bound and an order
        in which to take steps.
        """
        limited = np.isfinite(self.budget)
        if not limited.any():
            return
        for resource in np.flatnonzero(limited):
            yield np.eye(2)[resource]
        if limited.all() and (self.budget > 0).all():
            yield 1 / self.budget


@dataclass(frozen=True, eq=False)
class Steps:
    """Steps up, best gain for their price first; all arrays are [step].

    cell: index into the knapsack's cells. start, target: operation before and after. gain: float64.
    price: float64, cost of the step as weighed.
    """

    cell: Ints
    start: Operations
    target: Operations
    gain: Floats
    price: Floats

    def select(self, which: Ints | Flags) -> Steps:
        return Steps(
            self.cell[which], self.start[which], self.target[which], self.gain[which], self.price[which]
        )


def best_steps(knapsack: Knapsack, price: Floats, barred: Flags | None = None) -> Steps:
    """The steps from SHORTCUT everywhere, in order of gain for price.

    A cell whose backward pays better than its forward goes to FULL in one step, since FORWARD_ONLY alone would never
    be best. So each cell's steps are in their own order, too.

    barred: bool [cell], cells that never become FULL; None = none.
    """
    may = np.ones(len(knapsack.cells), dtype=bool) if barred is None else ~barred
    forward_price = float(price @ knapsack.forward_step)
    backward_price = float(price @ knapsack.backward_step)
    at_once = may & (
        _per_price(knapsack.backward_gain, backward_price) > _per_price(knapsack.forward_gain, forward_price)
    )
    kinds = [
        (~at_once, Operation.SHORTCUT, Operation.FORWARD_ONLY),
        (may & ~at_once, Operation.FORWARD_ONLY, Operation.FULL),
        (at_once, Operation.SHORTCUT, Operation.FULL),
    ]
    return _ordered(knapsack, price, kinds)


def next_steps(knapsack: Knapsack, operations: Operations, price: Floats, barred: Flags) -> Steps:
    """The single steps up from `operations`, in order of gain for price; `barred` cells never become FULL."""
    kinds = [
        (operations == Operation.SHORTCUT, Operation.SHORTCUT, Operation.FORWARD_ONLY),
        ((operations == Operation.FORWARD_ONLY) & ~barred, Operation.FORWARD_ONLY, Operation.FULL),
    ]
    return _ordered(knapsack, price, kinds)


def _ordered(knapsack: Knapsack, price: Floats, kinds: list[tuple[Flags, Operation, Operation]]) -> Steps:
    """In order of gain for price. Equal steps are ordered by kind, then by the whole gain of their cells. kinds: the
    cells that take such a step, bool [cell], and the operations before and after."""
    cell = np.concatenate([np.flatnonzero(takes) for takes, *_ in kinds])
    kind = np.repeat(np.arange(len(kinds)), [np.count_nonzero(takes) for takes, *_ in kinds])
    start, target = (np.array(each, dtype=np.uint8)[kind] for each in list(zip(*kinds, strict=True))[1:])
    forward, backward = start == Operation.SHORTCUT, target == Operation.FULL
    gain = np.where(forward, knapsack.forward_gain[cell], 0.0)
    gain = gain + np.where(backward, knapsack.backward_gain[cell], 0.0)
    its_price = forward * (price @ knapsack.forward_step) + backward * (price @ knapsack.backward_step)
    whole_gain = knapsack.forward_gain + knapsack.backward_gain
    order = np.lexsort((-whole_gain[cell], kind, -_per_price(gain, its_price)))
    return Steps(cell, start, target, gain, its_price).select(order)


def _per_price(gain: Floats, price: float | Floats) -> Floats:
    """Gain for price; inf for a step that costs nothing, even if it gains nothing, since it can always be taken."""
    return np.asarray(np.divide(gain, price, out=np.full(len(gain), np.inf), where=np.greater(price, 0)))


def device_knapsacks(problem: PlanProblem, most_shortcut: float = 1.0) -> list[Knapsack]:
    """One knapsack for each device. most_shortcut: share in [0, 1] of its heads in a (row, block) that may not run."""
    forward_gain, backward_gain = (gain.ravel() for gain in problem.gains())
    shortcut, forward, full = np.array([problem.compute_cost, problem.communication_cost]).T
    owned = np.cumsum(problem.cells_per_device)[:-1]
    cells_of_device = np.split(np.argsort(problem.device.ravel(), kind="stable"), owned)
    heads = problem.forward_score.shape[2]
    cells_of_row = problem.forward_score[0].size
    forward_step, backward_step = forward - shortcut, full - forward
    knapsacks = []
    for device, (cells, budget) in enumerate(zip(cells_of_device, problem.budgets_to_plan, strict=True)):
        left = budget - len(cells) * shortcut
        limits = [
            largest_use(len(cells), *each) for each in zip(forward_step, backward_step, left, strict=True)
        ]
        group = np.unique(cells // heads, return_inverse=True)[1]
        held = np.bincount(group)
        knapsacks.append(
            Knapsack(
                cells,
                forward_gain[cells],
                backward_gain[cells],
                forward_step,
                backward_step,
                np.array(limits),
                cells // cells_of_row,
                float(problem.memory_budget[device]),
                group,
                held - np.floor(most_shortcut * held + 1e-9).astype(np.int64),
            )
        )
    return knapsacks


def largest_use(cells: int, forward_step: float, backward_step: float, budget: float) -> float:
    """The largest cost within `budget` that whole numbers of steps can have; inf if all of them fit. This limit
    excludes no plan. A bound without it would count gains from a rest of the budget that no step can use.
    """
    if cells * (forward_step + backward_step) <= budget:
        return math.inf
    backward = np.arange(cells + 1)
    left = budget - backward * backward_step
    most = np.floor(left / forward_step) if forward_step > 0 else np.full(cells + 1, float(cells))
    forward = np.minimum(most, cells)
    use = backward * backward_step + forward * forward_step
    return float(use[(forward >= backward) & (left >= 0)].max(initial=0.0)) * (1 + _ROUNDING)
