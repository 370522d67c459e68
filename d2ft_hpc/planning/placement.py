"""Head placement: which tensor-parallel rank holds which head.

`place` is for the start of a run: plans in lock step lose less score if every rank holds heads of all kinds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.arrays import Ints, places
from d2ft_hpc.planning.problem import PlanProblem
from d2ft_hpc.planning.swap_heads import gains_per_cost, swap_heads


def in_order(blocks: int, heads: int, ranks: int) -> Ints:
    """The owner map int64 [block, head] of the usual placement: equally many heads to each rank, in timm's order.

    Raises PlanError if the heads cannot be divided evenly.
    """
    if ranks < 1 or heads % ranks:
        raise PlanError(f"{heads} heads cannot be divided evenly over {ranks} ranks.")
    return np.tile(np.repeat(np.arange(ranks), heads // ranks), (blocks, 1))


def place(problem: PlanProblem, ranks: int) -> Ints:
    """An owner map int64 [block, head] for `ranks` tensor-parallel ranks: `spread`, then swaps (`swap_heads`).

    problem: scores, costs, speeds and budgets on that many ranks; its own owner map does not matter.

    Raises PlanError if the heads cannot be divided evenly, or if no plan in lock step keeps the budgets.
    """
    return swap_heads(replace(problem, rank=spread(problem, ranks)))


def spread(problem: PlanProblem, ranks: int) -> Ints:
    """An owner map int64 [block, head] under which ranks that run equally many heads lose little by it.

    problem: scores and costs; its own owner map does not matter. The means over the rows count.

    A head is worth running forward up to some price of compute, and worth running backward up to another. In every
    block the heads are sorted by the first price and cut into groups of `ranks` heads, and likewise by the second;
    every rank then gets exactly one head of each group of either kind. This is always possible, by one perfect
    matching for each rank, since the groups of both kinds, joined by their heads, form a regular bipartite graph
    (Koenig, 1916).

    Raises PlanError if the heads cannot be divided evenly.
    """
    from scipy.optimize import linear_sum_assignment  # not before MPI starts, where a configuration is read

    forward_gain, backward_gain = (gain.mean(axis=0) for gain in problem.gains())
    prices = gains_per_cost(problem, forward_gain, backward_gain)
    blocks, heads = forward_gain.shape
    owner = in_order(blocks, heads, ranks)
    for block in range(blocks):
        groups = [places(price[block]) // ranks for price in prices]
        heads_of: dict[tuple[int, int], list[int]] = {}
        for head, pair in enumerate(zip(*groups, strict=True)):
            heads_of.setdefault(pair, []).append(head)
        left = np.zeros((heads // ranks,) * 2)
        for pair, its_heads in heads_of.items():
            left[pair] = len(its_heads)
        for rank in range(ranks):
            for pair in zip(*linear_sum_assignment(left > 0, maximize=True), strict=True):
                owner[block, heads_of[pair].pop(0)] = rank
                left[pair] -= 1
    return owner
