"""Upper bounds on what a plan of a device's knapsack can score, and plans that carry them as evidence.

Where memory is scarce, the rows of a device hold few FULL cells. Given a price of the budget, every cell does what is
worth most at that price; in each row, the cells that gain most by it become FULL, as many as the memory holds. Their
value plus the worth of the budget is an upper bound at any price. At the price with the least bound, a good plan
makes the same cells FULL.
"""

from __future__ import annotations

import math
import time

import numpy as np

from d2ft_hpc.planning.arrays import Flags, Floats, Operations
from d2ft_hpc.planning.highs import OPTIMAL
from d2ft_hpc.planning.knapsack import Knapsack, best_steps, device_knapsacks
from d2ft_hpc.planning.plan import SkipPlan
from d2ft_hpc.planning.prices import RELATIVE_GAP
from d2ft_hpc.planning.problem import PlanProblem

_ROUNDS = 30  # of closing in on a price; ten are usual
_LATE_ROUNDS = 3  # will do where time is short
_NEAR = 1e-8


def upper_bound(knapsack: Knapsack, deadline: float = math.inf) -> float:
    """No plan of the device scores more: the best bound of its one-budget relaxations.

    deadline: of time.monotonic(), after which a bound near the best will do.

    Each takes the steps in order and a fraction of the first that does not fit (Dantzig 1957; with choices
    of several steps, Sinha and Zoltners 1979). Scarce memory lowers it further.
    """
    bound = float(knapsack.forward_gain.sum() + knapsack.backward_gain.sum())
    prices = [*knapsack.prices()]
    for price in prices:
        if time.monotonic() > deadline:
            break
        steps = best_steps(knapsack, price)
        budget = float(price[price > 0] @ knapsack.budget[price > 0])
        spent = np.cumsum(steps.price)
        count = int(np.searchsorted(spent, budget, side="right"))
        total = float(steps.gain[:count].sum())
        if count < len(spent):
            before = float(spent[count - 1]) if count else 0.0
            total += float(steps.gain[count]) * (budget - before) / float(steps.price[count])
        bound = min(bound, total)
    if math.isfinite(knapsack.memory) or time.monotonic() > deadline:
        for price in reversed(prices or [np.zeros(2)]):
            bound = min(bound, price_memory(knapsack, price, deadline)[0])
            if time.monotonic() > deadline:
                break
    return bound


def price_memory(knapsack: Knapsack, price: Floats, deadline: float = math.inf) -> tuple[float, Floats]:
    """The least bound over all multiples of `price` float64 [2] (`Knapsack.prices`), and what each cell then gains by
    being FULL, float64 [cell]. After the deadline, of time.monotonic(), a multiple near the best will do.

    The bound is convex in the multiple: the lines that touch it from both sides of its least close in on that.
    """
    forward_price, backward_price = (
        float(price @ step) for step in (knapsack.forward_step, knapsack.backward_step)
    )
    used = price > 0
    budget = float(price[used] @ knapsack.budget[used])

    def at(multiple: float) -> tuple[float, float]:
        """The bound at a multiple of the price, and its slope there: what is left of the budget."""
        running = knapsack.forward_gain - multiple * forward_price
        gained = np.maximum(running, 0.0)
        more = gain_of_full(multiple)
        full = most_gaining(knapsack, more) & (more > 0)
        spent = forward_price * np.count_nonzero((running > 0) | full) + backward_price * np.count_nonzero(
            full
        )
        return float(gained.sum() + more[full].sum()) + multiple * budget, budget - spent

    def gain_of_full(multiple: float) -> Floats:
        running = knapsack.forward_gain - multiple * forward_price
        return running + knapsack.backward_gain - multiple * backward_price - np.maximum(running, 0.0)

    low, (low_bound, low_slope) = 0.0, at(0.0)
    best, bound = low, low_bound
    if low_slope >= 0 or not len(knapsack.cells):
        return bound, gain_of_full(low)
    cheapest = min(step for step in (forward_price, forward_price + backward_price) if step > 0)
    high = float((knapsack.forward_gain + knapsack.backward_gain).max()) / cheapest
    high_bound, high_slope = at(high)
    for round_ in range(_ROUNDS):
        if high_slope <= low_slope or (round_ >= _LATE_ROUNDS and time.monotonic() > deadline):
            break
        middle = (low_bound - high_bound + high_slope * high - low_slope * low) / (high_slope - low_slope)
        touched = low_bound + low_slope * (middle - low)  # nowhere is the bound lower than here
        if not low < middle < high or touched >= bound * (1 - _NEAR):
            break
        its_bound, slope = at(middle)
        if its_bound < bound:
            best, bound = middle, its_bound
        if slope < 0:
            low, low_bound, low_slope = middle, its_bound, slope
        else:
            high, high_bound, high_slope = middle, its_bound, slope
    return bound, gain_of_full(best)


def most_gaining(knapsack: Knapsack, gain: Floats, first: Flags | None = None) -> Flags:
    """The cells with the largest gain in every row, as many as the memory holds: bool [cell].

    first: bool [cell], cells that come before all others.
    """
    rows = max(1, knapsack.rows)  # equally long ones, one after the other
    table = np.where(first, np.inf, gain).reshape(rows, -1) if first is not None else gain.reshape(rows, -1)
    if knapsack.memory >= table.shape[1]:
        return np.ones(len(gain), dtype=bool)
    count = int(knapsack.memory)
    most = np.zeros(table.shape, dtype=bool)
    chosen = np.argpartition(-table, count, axis=1)[:, :count]
    np.put_along_axis(most, chosen, True, axis=1)
    return most.ravel()


def plan_with_bound(
    problem: PlanProblem,
    operations: Operations,
    *,
    planner: str,
    status: str | set[str],
    bound: float | None = None,
) -> SkipPlan:
    """The plan with its objective, bound (by default the sum of the devices' upper bounds) and gap.

    status: of a search in several parts, how each ended: the plan is optimal if all are, or if the bound proves it.
    """
    if bound is None:
        knapsacks = device_knapsacks(problem)
        bound = sum(upper_bound(knapsack) for knapsack in knapsacks)
    objective = problem.objective(operations)
    bound = max(bound, objective)  # they may differ by float error
    if isinstance(status, set):
        is_proved = status == {OPTIMAL} or bound - objective <= RELATIVE_GAP * bound
        status = OPTIMAL if is_proved else "; ".join(sorted(status - {OPTIMAL}))
    return SkipPlan(
        operations,
        problem.replicas,
        planner=planner,
        objective=objective,
        bound=bound,
        gap=(bound - objective) / bound if bound > 0 else 0.0,
        status=status,
    )
