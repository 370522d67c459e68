"""What D2FT is compared with, as plans under the same budgets: random scheduling, pruning and routing as in the paper,
and last blocks and stochastic depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.arrays import Ints, Operations
from d2ft_hpc.planning.bounds import plan_with_bound
from d2ft_hpc.planning.paper import PaperOptions, two_levels
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.planner import Planner
from d2ft_hpc.planning.problem import PlanProblem, check


def solve_random(problem: PlanProblem, *, seed: int | Sequence[int], full_share: float = 0.8) -> SkipPlan:
    """The plan of `solve_paper` with random numbers for scores; the same for the same seed (numbers >= 0).

    Objective, bound and gap are those of the real scores: how far random is from what the budgets permit.
    """
    generator = np.random.default_rng(seed)
    full_key, forward_key = generator.random((2, *problem.forward_score.shape))
    operations = two_levels(problem, full_key, forward_key, full_share)
    return plan_with_bound(problem, operations, planner=RANDOM.name, status=f"seed {seed}")


def solve_last_blocks(problem: PlanProblem) -> SkipPlan:
    """The top blocks FULL in every row, those below FORWARD_ONLY; no scores.

    The block between takes what is left of the budgets: FULL in the first rows of each replica. Raises PlanError if
    the budgets do not pay for FORWARD_ONLY everywhere.
    """
    rows, blocks, _ = problem.forward_score.shape
    order = np.arange(blocks)[::-1] * problem.slots + np.arange(rows)[:, None] // problem.replicas
    return _longest(problem, order[:, :, None], Operation.FORWARD_ONLY, LAST_BLOCKS.name)


def solve_stochastic_depth(problem: PlanProblem, *, seed: int | Sequence[int]) -> SkipPlan:
    """Random whole blocks SHORTCUT in random rows, every block in as many rows (to one); no scores.

    Stochastic depth (arXiv 1603.09382) at a rate that does not depend on the depth, by micro-batch. What a block gives
    is not scaled up for the rows that skip it.
    """
    rows, blocks, _ = problem.forward_score.shape
    slots, generator = problem.slots, np.random.default_rng(seed)
    order = np.empty((slots, problem.replicas, blocks), dtype=np.int64)
    for replica in range(problem.replicas):
        turn = generator.permuted(np.tile(np.arange(slots)[:, None], blocks), axis=0)  # [slot, block]
        within = generator.permuted(np.tile(np.arange(blocks), (slots, 1)), axis=1)  # [turn, block]
        order[:, replica] = turn * blocks + np.take_along_axis(within, turn, axis=0)
    return _longest(problem, order.reshape(rows, blocks, 1), Operation.SHORTCUT, STOCHASTIC_DEPTH.name)


def solve_pruning(problem: PlanProblem) -> SkipPlan:
    """The subnets with the smallest backward score, summed over the rows, SHORTCUT in every row; the others FULL.

    Dynamic pruning of arXiv 2504.12471, "M" with weight magnitude and "M/G" with magnitude times gradient (Taylor)
    for the score; replanning makes it dynamic.
    """
    score = problem.backward_score.sum(axis=0)
    order = np.empty(score.size, dtype=np.int64)
    order[np.argsort(-score.ravel(), kind="stable")] = np.arange(score.size)
    everywhere = np.broadcast_to(order.reshape(score.shape), problem.forward_score.shape)
    return _longest(problem, everywhere, Operation.SHORTCUT, PRUNING.name)


def solve_routing(problem: PlanProblem, *, capacity_factor: float = 1.25) -> SkipPlan:
    """Mixture of experts after GShard (arXiv 2006.16668): in each block a row goes to its top-k heads.

    The heads are the experts, a row (micro-batch) is what a token is there, and its gate is its forward score. All
    first choices are served before any second choice, in the order of the rows. A head takes at most capacity_factor
    times its fair share of a replica's rows; a row that comes too late for a head goes without it. Heads that are not
    chosen are SHORTCUT. k is as large as the budgets allow, in the upper blocks one larger than below.

    Unlike GShard's, the gate is measured, not learned, and does not scale what the heads give: either would change the
    function of the pretrained model.

    Raises PlanError if `capacity_factor` is not > 0.
    """
    if not capacity_factor > 0:
        raise PlanError(f"capacity_factor must be > 0, got {capacity_factor}.")
    rows, blocks, heads = problem.forward_score.shape
    choices = np.argsort(-problem.forward_score, axis=2, kind="stable")  # [row, block, choice]

    def operations(count: int) -> Operations:
        made = np.full((rows, blocks, heads), Operation.SHORTCUT, dtype=np.uint8)
        for block in range(blocks):
            top_k = count // blocks + (blocks - 1 - block < count % blocks)
            capacity = math.ceil(capacity_factor * problem.slots * top_k / heads)
            for replica in range(problem.replicas):
                taken = np.zeros(heads, dtype=np.int64)
                for choice in choices[replica :: problem.replicas, block, :top_k].T:
                    for slot, head in enumerate(choice):
                        if taken[head] < capacity:
                            made[slot * problem.replicas + replica, block, head] = Operation.FULL
                            taken[head] += 1
        return made

    return _largest(problem, operations, blocks * heads, ROUTING.name)


def _longest(problem: PlanProblem, order: Ints, rest: Operation, planner: str) -> SkipPlan:
    """The cells with the smallest `order` FULL, as many as the budgets pay for, and the others `rest`. Cells of equal
    order get the same.

    order: from 0, broadcasts to [row, block, head].
    """
    order = np.broadcast_to(order, problem.forward_score.shape)

    def operations(count: int) -> Operations:
        return np.where(order < count, Operation.FULL, rest).astype(np.uint8)

    return _largest(problem, operations, int(order.max()) + 1, planner)


def _largest(
    problem: PlanProblem, operations: Callable[[int], Operations], most: int, planner: str
) -> SkipPlan:
    """The plan of the largest count in 0..most that keeps the budgets; a larger count costs more. Raises PlanError if
    none does."""

    def plan(count: int) -> SkipPlan:
        return SkipPlan(operations(count), problem.replicas, planner=planner)

    def fits(count: int) -> bool:
        try:
            check(plan(count), problem)
        except PlanError:
            return False
        return True

    check(plan(0), problem)
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return plan_with_bound(problem, operations(low), planner=planner, status=f"{low} of {most}")


RANDOM = Planner(
    "random",
    "baseline of the paper: its numbers of each operation, drawn at random",
    solve_random,
    PaperOptions,
    reads_scores=False,
)
LAST_BLOCKS = Planner(
    "last_blocks",
    "baseline: the top blocks FULL, those below FORWARD_ONLY",
    solve_last_blocks,
    reads_scores=False,
)
STOCHASTIC_DEPTH = Planner(
    "stochastic_depth",
    "baseline: whole blocks SHORTCUT at random",
    solve_stochastic_depth,
    reads_scores=False,
)
PRUNING = Planner(
    "pruning", "baseline of the paper: the subnets with the smallest backward scores SHORTCUT", solve_pruning
)
ROUTING = Planner(
    "routing",
    "baseline of the paper: mixture of experts, the heads with the largest forward scores",
    solve_routing,
)
