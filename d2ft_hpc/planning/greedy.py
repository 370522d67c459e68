"""Takes the steps with the best gain for their cost first: instant and near the optimum. `joint` starts from it."""

from __future__ import annotations

import math
import time

import numpy as np

from d2ft_hpc.planning.arrays import Flags, Floats, Operations
from d2ft_hpc.planning.bounds import most_gaining, price_memory
from d2ft_hpc.planning.knapsack import Knapsack, Steps, best_steps, next_steps
from d2ft_hpc.planning.plan import Operation


def greedy(knapsack: Knapsack, start: Operations | None = None, deadline: float = math.inf) -> Operations:
    """Operations uint8 [cell] within the budgets: the best of the orders that the two budgets suggest.

    start: operations that the result may raise but never lowers; None = all SHORTCUT. They keep the budgets, even
        after the cells that must run have been added.
    deadline: of time.monotonic(), after which the best so far is taken, or, without one, the cells that gain most.

    Where memory is scarce, only the cells of a row that gain most by it may become FULL.
    """
    if start is None:
        start = np.full(len(knapsack.cells), Operation.SHORTCUT, dtype=np.uint8)
    start = knapsack.raised_to_least(start)
    is_full = start == Operation.FULL
    candidates = []
    for price in knapsack.prices():
        if time.monotonic() > deadline:
            break
        barred = _barred_from_full(knapsack, is_full, price)
        operations = start.copy()
        _climb(knapsack, operations, best_steps(knapsack, price, barred))
        _fill(knapsack, operations, price, barred)
        candidates.append(operations)
    if not candidates and np.isfinite(knapsack.budget).any():
        return _with_most_gaining(knapsack, start)
    if not candidates:  # no budget is limited
        barred = _barred_from_full(knapsack, is_full, np.zeros(2))
        return np.where(barred, Operation.FORWARD_ONLY, Operation.FULL).astype(np.uint8)
    return max(candidates, key=knapsack.objective)


def _with_most_gaining(knapsack: Knapsack, start: Operations) -> Operations:
    """On top of `start`, the cells that gain most become FULL, as many as the budgets pay for, and then
    FORWARD_ONLY."""
    operations: Operations = start.copy()
    whole_gain = knapsack.forward_gain + knapsack.backward_gain
    has_room = most_gaining(knapsack, whole_gain, start == Operation.FULL)
    for target, gain, step, may in (
        (Operation.FULL, whole_gain, knapsack.forward_step + knapsack.backward_step, has_room),
        (Operation.FORWARD_ONLY, knapsack.forward_gain, knapsack.forward_step, True),
    ):
        cells = np.flatnonzero((operations < target) & may)
        left = knapsack.budget - knapsack.used(operations)
        paid = np.floor(left[step > 0] / step[step > 0]).min(initial=len(cells))
        count = max(int(paid), 0)
        if count < len(cells):
            cells = cells[np.argpartition(-gain[cells], count)[:count]]
        operations[cells] = target
    return operations


def _barred_from_full(knapsack: Knapsack, is_full: Flags, price: Floats) -> Flags:
    """Cells for which the memory has no room once the cells that gain more have theirs: bool [cell]. is_full: bool
    [cell], the cells that have room already."""
    if math.isinf(knapsack.memory):
        return np.zeros(len(knapsack.cells), dtype=bool)
    _, gain = price_memory(knapsack, price)
    return ~most_gaining(knapsack, gain, is_full)


def _fill(
    knapsack: Knapsack,
    operations: Operations,
    price: Floats,
    barred: Flags,
) -> None:
    """Raise operations uint8 [cell] in place by single steps until nothing more fits."""
    while True:
        before = operations.copy()
        _climb(knapsack, operations, next_steps(knapsack, operations, price, barred))
        if np.array_equal(before, operations):
            return


def _climb(knapsack: Knapsack, operations: Operations, steps: Steps) -> None:
    """Take the steps in their order, in place, leaving out what does not fit.

    All steps of a kind cost the same and the budget only shrinks: a kind that does not fit once is done.
    """
    forward_fits = True
    while True:
        now = operations[steps.cell]
        # FORWARD_ONLY -> FULL waits behind its own SHORTCUT -> FORWARD_ONLY, if that can still come.
        steps = steps.select((now == steps.start) | ((now < steps.start) & forward_fits))
        forward = np.cumsum(steps.start == Operation.SHORTCUT)
        backward = np.cumsum(steps.target == Operation.FULL)
        spent = forward[:, None] * knapsack.forward_step + backward[:, None] * knapsack.backward_step
        misfits = np.flatnonzero((knapsack.used(operations) + spent > knapsack.budget).any(axis=1))
        count = int(misfits[0]) if len(misfits) else len(steps.cell)
        operations[steps.cell[:count]] = steps.target[:count]
        if not len(misfits):
            return
        start, target = steps.start[count], steps.target[count]
        forward_fits &= target != Operation.FORWARD_ONLY
        steps = steps.select((steps.start != start) | (steps.target != target))
