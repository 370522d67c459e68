"""The best row counts that a budget pays for, on replicas that finish together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.highs import OPTIMAL, Rows, maximise_integer
from d2ft_hpc.planning.problem import BUDGET_EPSILON, Floats, Ints, finish_together, round_up
from d2ft_hpc.planning.row_counts import RowCosts, RowCounts

_ROUNDING = 1e-12  # of sums of the same numbers in another order
_NEAR = 8  # rows up and down from the rounded counts among which HiGHS decides


def solve_row_counts(
    *,
    rows: int,
    speed: Sequence[float],
    block_cost: npt.ArrayLike,
    budget: float,
    forward_share: float = 1 / 3,
    always_cost: float = 0.0,
    run_share: float = 1.0,
    bottom_to_top: float = 1 / 3,
    variance: npt.ArrayLike | None = None,
    seed: int = 0,
    time_limit_seconds: float = 1.0,
) -> RowCounts:
    """Counts for replicas that all finish a micro-batch together, within the budget.

    rows: rows of a micro-batch of one replica, before any is dropped.
    speed: float [replica] > 0, relative speeds. A replica's compute follows its speed, at most its dense one.
    block_cost: float [block] > 0, compute of a row's forward and backward in each block, in any unit.
    budget: share in (0, 1] of the dense step's compute, over all replicas.
    forward_share: the forward's part of `block_cost`, in [0, 1).
    always_cost: compute of a row outside the blocks (embedding, classifier), in the unit of `block_cost`.
    run_share: share in (0, 1] of the rows that run forward on a replica of mean speed; slower ones run fewer, faster
        ones more, in proportion to their compute, and never more than all.
    bottom_to_top: backward rows of the first block over those of the last, > 0; linear in between. How many that are
        follows from what the budget leaves after the forward. (run_share 1, budget 0.6 and 1/3 keep 60 % of the rows
        in the last block and 20 % in the first.)
    variance: float [block] >= 0, takes the place of `bottom_to_top`: each block's part of the variance of the weight
        gradients, for which the counts are chosen (VCAS, arXiv 2402.17227).

    Keeping k of n rows, each weighted n / k, multiplies a block's variance by 1 / k: the sum of variance / k over
    blocks and replicas is minimised. Without a budget for whole rows the best counts are in the proportion
    sqrt(variance / backward cost), so a linear profile is the same problem with variance = profile^2 * cost.

    Solved in whole rows by HiGHS, which proves the optimum; if time runs out, the bound says how good the counts are.
    The same input gives the same counts, unless time runs out.

    Raises PlanError if a value is out of range, or if the budget does not pay for `run_share` forward rows and one
    backward row in every block (the message names the replica and the least feasible budget).
    """
    costs = RowCosts(np.asarray(block_cost, dtype=np.float64), forward_share, always_cost)
    speeds = np.asarray(speed, dtype=np.float64)
    _check_input(costs, speeds, rows, budget, run_share, bottom_to_top)
    costs = RowCosts(costs.block / costs.dense, forward_share, always_cost / costs.dense)
    blocks = len(costs.block)
    if variance is None:
        weight = np.linspace(bottom_to_top, 1.0, blocks) ** 2 * costs.backward
    else:
        weight = np.asarray(variance, dtype=np.float64)
        if weight.shape != (blocks,) or not (np.isfinite(weight) & (weight >= 0)).all():
            raise PlanError(f"variance needs {blocks} finite numbers >= 0, got {weight.tolist()}.")
    # A block of no variance wants no rows, yet gets one; a tiny weight keeps the arithmetic finite.
    weight = np.maximum(weight / (weight.max() or 1.0), 1e-9)
    share = finish_together(speeds, np.full(len(speeds), rows), budget)
    counts = np.empty((len(speeds), blocks), dtype=np.int64)
    rows_run = np.floor(np.minimum(1.0, run_share * share / budget) * rows + BUDGET_EPSILON).astype(np.int64)
    bounds, statuses = np.empty(len(speeds)), set()
    solved: dict[tuple[int, float], tuple[Ints, float, str]] = {}
    for replica, its_rows in enumerate(rows_run.tolist()):
        left = float(share[replica]) * rows * (1 + BUDGET_EPSILON / 2) - its_rows * costs.run
        if its_rows < 1 or left < costs.backward.sum():
            raise PlanError(_unpaid(costs, rows, run_share, budget, float(share[replica]), replica))
        key = (its_rows, left)  # replicas of one speed are alike
        if key not in solved:
            seconds = time_limit_seconds / len(speeds)
            solved[key] = _best_counts(weight, costs.backward, its_rows, left, seconds)
        counts[replica], bounds[replica], status = solved[key]
        statuses.add(status)
    objective = float((weight / counts).sum() / (weight.sum() * len(speeds)))
    bound = min(objective, float(bounds.sum() / (weight.sum() * len(speeds))))
    return RowCounts(
        counts,
        rows_run,
        rows,
        seed,
        objective=objective,
        bound=bound,
        gap=(objective - bound) / objective,
        status=OPTIMAL if statuses == {OPTIMAL} else "; ".join(sorted(statuses - {OPTIMAL})),
    )


def _best_counts(
    weight: Floats, cost: Floats, most: int, budget: float, seconds: float
) -> tuple[Ints, float, str]:
    """Whole numbers 1 <= k[0] <= k[1] <= ... <= most with the least sum of weight / k and cost @ k <= budget; a bound
    on that sum; and how it ended."""
    ideal = _fractional_counts(weight, cost, float(most), budget)
    # Nothing within the limits leads downhill from the ideal x: (weight / x^2) @ (k - x) <= 0 for every allowed k.
    # So the sum of weight / k is at least that of weight / k + weight * k / x^2, less that of weight / x; and the
    # best whole number for each block alone gives a bound.
    options = np.arange(1, most + 1)
    alone = weight[:, None] * (1 / options + options / ideal[:, None] ** 2)  # [block, option]
    bound = float(alone.min(axis=1).sum() - (weight / ideal).sum())
    counts = _round_down_and_fill(weight, cost, ideal, most, budget)
    value = float((weight / counts).sum())
    if value <= bound * (1 + _ROUNDING):
        return counts, bound, OPTIMAL
    # No count that costs more than the gap is in a better plan: HiGHS decides among the others.
    promising = alone - alone.min(axis=1, keepdims=True) <= (value - bound) * (1 + 1e-6)
    lowest = np.minimum(promising.argmax(axis=1) + 1, counts)
    highest = np.maximum(most - promising[:, ::-1].argmax(axis=1), counts)
    near_low, near_high = np.maximum(lowest, counts - _NEAR), np.minimum(highest, counts + _NEAR)
    is_complete = bool((near_low == lowest).all() and (near_high == highest).all())
    if (near_low == near_high).all():
        return counts, value, OPTIMAL
    solution = maximise_integer(*_model(weight, cost, near_low, near_high, budget), seconds=seconds)
    if solution.values is not None:
        block = np.repeat(np.arange(len(weight)), near_high - near_low)
        better = near_low + np.bincount(block, np.rint(solution.values), len(weight)).astype(np.int64)
        if cost @ better <= budget and (np.diff(better) >= 0).all() and (weight / better).sum() <= value:
            counts, value = better, float((weight / better).sum())
    if is_complete and math.isfinite(solution.bound):
        bound = max(bound, float((weight / near_low).sum() - solution.bound * weight.max()))
    status = (
        solution.status if is_complete or solution.status != OPTIMAL else "optimal among the nearest counts"
    )
    return counts, min(bound, value), status


def _fractional_counts(weight: Floats, cost: Floats, most: float, budget: float) -> Floats:
    """The same problem without whole numbers, float64 [block].

    A block alone wants sqrt(weight / (price * cost)) rows. Neighbours that would want fewer rows than the block below
    them are treated as one block, whatever the price (pool adjacent violators).
    """
    pools: list[list[float]] = []  # weight, cost, blocks
    for one in zip(weight, cost, np.ones(len(weight)), strict=True):
        pools.append([float(number) for number in one])
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] > pools[-1][0] * pools[-2][1]:
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    pooled = np.array(pools)
    wanted = np.repeat(np.sqrt(pooled[:, 0] / pooled[:, 1]), pooled[:, 2].astype(np.int64))
    if cost.sum() * most <= budget:
        return np.full(len(weight), most)
    low, high = 0.0, most / float(wanted.min())
    for _ in range(200):
        middle = (low + high) / 2
        if cost @ np.clip(middle * wanted, 1.0, most) <= budget:
            low = middle
        else:
            high = middle
    return np.clip(low * wanted, 1.0, most)


def _round_down_and_fill(weight: Floats, cost: Floats, ideal: Floats, most: int, budget: float) -> Ints:
    """Whole counts within the budget near the ideal ones: rounded down, then row by row where a row gains most."""
    counts = np.floor(ideal * (1 + _ROUNDING)).astype(np.int64)
    while True:
        above = np.append(counts[1:], most)
        gain = np.where(counts < above, weight * (1 / counts - 1 / (counts + 1)) / cost, -np.inf)
        gain[cost @ counts + cost > budget] = -np.inf
        best = int(gain.argmax())
        if gain[best] == -np.inf:
            return counts
        counts[best] += 1


def _model(weight: Floats, cost: Floats, lowest: Ints, highest: Ints, budget: float) -> tuple[Floats, Rows]:
    """One variable for each further row of a block from lowest to highest; a block's later rows gain less, so no
    constraint needs to say that they come one after the other. Gains are in units of the largest weight."""
    spans = highest - lowest
    block = np.repeat(np.arange(len(weight)), spans)
    count = np.concatenate([np.arange(low, high) for low, high in zip(lowest, highest, strict=True)])
    gain = weight[block] / weight.max() * (1 / count - 1 / (count + 1))
    variables = np.arange(len(block))
    # Row 0 is the budget; row b says that block b - 1 has no more rows than block b.
    is_lower, is_upper = block < len(weight) - 1, block > 0
    return gain, Rows(
        row=np.concatenate([np.zeros_like(block), block[is_lower] + 1, block[is_upper]]),
        column=np.concatenate([variables, variables[is_lower], variables[is_upper]]),
        value=np.concatenate([cost[block], np.ones(is_lower.sum()), -np.ones(is_upper.sum())]),
        lower=np.full(len(weight), -math.inf),
        upper=np.concatenate([[budget - cost @ lowest], np.diff(lowest)]),
    )


def _check_input(
    costs: RowCosts, speed: Floats, rows: int, budget: float, run_share: float, bottom_to_top: float
) -> None:
    if rows < 1:
        raise PlanError(f"rows must be at least 1, got {rows}.")
    for name, values in (("block_cost", costs.block), ("speed", speed)):
        if values.ndim != 1 or not len(values) or not (np.isfinite(values) & (values > 0)).all():
            raise PlanError(f"{name} must be a list of finite numbers > 0, got {values.tolist()}.")
    for name, value in (("budget", budget), ("run_share", run_share)):
        if not 0 < value <= 1:
            raise PlanError(f"{name} is a share in (0, 1], got {value}.")
    if not 0 <= costs.forward_share < 1:
        raise PlanError(f"forward_share is a share in [0, 1), got {costs.forward_share}.")
    if not 0 <= costs.always < math.inf:
        raise PlanError(f"always_cost must be finite and >= 0, got {costs.always}.")
    if not 0 < bottom_to_top < math.inf:
        raise PlanError(f"bottom_to_top must be finite and > 0, got {bottom_to_top}.")


def _unpaid(costs: RowCosts, rows: int, run_share: float, budget: float, share: float, replica: int) -> str:
    """The message for a replica whose compute does not pay for its forward rows and one backward row a block."""
    least = run_share * costs.run + costs.backward.sum() / rows * budget / share
    least = max(least, budget / (share * run_share * rows))
    return (
        f"compute budget {budget:g} gives replica {replica} {share:.4f} of its dense compute, which does not pay for "
        f"the forward of its part of run_share {run_share:g} and one backward row in every block. The least feasible "
        f"budget is about {round_up(least):g}; raise it, or lower run_share."
    )
