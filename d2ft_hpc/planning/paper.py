"""The planner of arXiv 2504.12471: a bi-level knapsack in which every subnet is a device of its own."""

from __future__ import annotations

import numpy as np

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.arrays import Flags, Floats, Ints, Operations, places
from d2ft_hpc.planning.bounds import plan_with_bound
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.planner import Options, Planner
from d2ft_hpc.planning.problem import BUDGET_EPSILON, PlanProblem
from d2ft_hpc.settings import Fraction


def solve_paper(problem: PlanProblem, *, full_share: float = 0.8) -> SkipPlan:
    """FULL by backward score first, then FORWARD_ONLY by forward score with what is left.

    Every (device, block, head) gets a part of its device's budgets, in proportion to its share of the device's cells,
    and spends at most `full_share` (in [0, 1]) of it on FULL.

    All rows of a subnet cost the same, so each level is solved exactly by sorting. Objective, bound and gap are those
    of `joint`: they show how far two separately optimal levels are from what the budgets permit.

    Raises PlanError if `full_share` is out of range.
    """
    operations = two_levels(problem, problem.backward_score, problem.forward_score, full_share)
    return plan_with_bound(problem, operations, planner=PAPER.name, status="optimal at each level")


def two_levels(problem: PlanProblem, full_key: Floats, forward_key: Floats, full_share: float) -> Operations:
    """Operations uint8 [row, block, head]: in every subnet the rows with the largest `full_key` are FULL, and of the
    others those with the largest `forward_key` FORWARD_ONLY, as many as the budgets pay for. Ties go to the earlier
    row. Budget that rounding leaves turns FORWARD_ONLY into FULL where the subnet's own share pays for it.
    """
    if not 0 <= full_share <= 1:
        raise PlanError(f"full_share is a share of the budget in [0, 1], got {full_share}.")
    costs = np.array([problem.compute_cost, problem.communication_cost])  # [resource, operation]
    forward_step = costs[:, Operation.FORWARD_ONLY] - costs[:, Operation.SHORTCUT]
    upgrade_step = costs[:, Operation.FULL] - costs[:, Operation.FORWARD_ONLY]
    most = costs[:, Operation.FULL] * (1 + BUDGET_EPSILON / 2)  # more than dense buys nothing
    cells = problem.cells_per_device
    operations = np.full(problem.forward_score.shape, Operation.SHORTCUT, dtype=np.uint8)
    for device, budget in enumerate(problem.budgets_to_plan):
        its_rows = slice(device // (problem.stages * problem.ranks), None, problem.replicas)  # of its replica
        full_keys, forward_keys = full_key[its_rows], forward_key[its_rows]
        mine = problem.device[its_rows] == device
        rows = mine.sum(axis=0)  # [block, head]
        per_row = np.minimum(budget / max(int(cells[device]), 1), most)
        per_row = per_row - costs[:, Operation.SHORTCUT]
        left = per_row[:, None, None] * rows  # [resource, block, head]

        full = _affordable(full_share * left, forward_step + upgrade_step, rows)
        left = left - full * (forward_step + upgrade_step)[:, None, None]
        forward = _affordable(left, forward_step, rows - full)
        left = left - forward * forward_step[:, None, None]
        upgraded = _affordable(left, upgrade_step, forward)

        is_full = _rank(full_keys, mine) < full
        is_forward = _rank(forward_keys, mine & ~is_full) < forward
        is_full |= _rank(full_keys, is_forward) < upgraded
        operations[its_rows][is_forward] = Operation.FORWARD_ONLY
        operations[its_rows][is_full] = Operation.FULL
    return operations


def _affordable(budget: Floats, step: Floats, limit: Ints) -> Ints:
    """How many steps of cost `step` [resource] fit into `budget` [resource, block, head], at most `limit`."""
    count = limit
    for left, cost in zip(budget, step, strict=True):
        if cost > 0:
            count = np.minimum(count, np.floor(np.maximum(left, 0.0) / cost)).astype(np.int64)
    return count


def _rank(key: Floats, among: Flags) -> Ints:
    """Place of each row among the rows of its subnet that are in `among`, largest key first; others last."""
    return places(np.where(among, key, -np.inf))


class PaperOptions(Options):
    """Options of the two planners that spend the budget level by level."""

    full_share: Fraction = 0.8
    """Most of the budget that FULL may take before FORWARD_ONLY."""


PAPER = Planner(
    "paper",
    "the paper's bi-level knapsack: FULL by backward score, then FORWARD_ONLY by forward score",
    solve_paper,
    PaperOptions,
    needs_scores_for=("memory_budget",),
)
