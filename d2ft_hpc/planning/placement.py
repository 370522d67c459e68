"""Head placement: which tensor-parallel rank holds which head, and the same model with its heads in that order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.problem import BUDGET_EPSILON, Floats, Ints, PlanProblem

if TYPE_CHECKING:
    from torch import nn


def in_order(blocks: int, heads: int, ranks: int) -> Ints:
    """The owner map int64 [block, head] of the usual placement: equally many heads to each rank, in timm's order.

    Raises PlanError if the heads cannot be divided evenly.
    """
    if ranks < 1 or heads % ranks:
        raise PlanError(f"{heads} heads cannot be divided evenly over {ranks} ranks.")
    return np.tile(np.repeat(np.arange(ranks), heads // ranks), (blocks, 1))


def spread(problem: PlanProblem, ranks: int) -> Ints:
    """An owner map int64 [block, head] under which ranks that run equally many heads lose little by it.

    problem: scores and costs; its own owner map does not matter. The means over the rows count.

    A head is worth running forward up to some price of compute, and worth running backward up to another. In every
    block the heads are put in order of the one price and cut into groups of `ranks` heads, and again by the other;
    every rank then gets exactly one head of each group of both kinds. That is always possible (the groups of both
    kinds and their heads form a regular bipartite graph: Koenig, 1916), one perfect matching a rank.

    Raises PlanError if the heads cannot be divided evenly.
    """
    forward_gain, backward_gain = (gain.mean(axis=0) for gain in problem.gains())
    shortcut, forward_only, full = problem.compute_cost
    both = (forward_gain + backward_gain) / max(full - shortcut, BUDGET_EPSILON)
    forward_price = np.maximum(forward_gain / max(forward_only - shortcut, BUDGET_EPSILON), both)
    backward_price = np.minimum(backward_gain / max(full - forward_only, BUDGET_EPSILON), both)
    owner = in_order(len(both), both.shape[1], ranks)
    for block in range(len(owner)):
        groups = [_place(price[block]) // ranks for price in (forward_price, backward_price)]
        heads_of: dict[tuple[int, int], list[int]] = {}
        for head, pair in enumerate(zip(*groups, strict=True)):
            heads_of.setdefault(pair, []).append(head)
        left = np.zeros((len(owner[block]) // ranks,) * 2)
        for pair, heads in heads_of.items():
            left[pair] = len(heads)
        for rank in range(ranks):
            for pair in zip(*linear_sum_assignment(left > 0, maximize=True), strict=True):
                owner[block, heads_of[pair].pop(0)] = rank
                left[pair] -= 1
    return owner


def _place(price: Floats) -> Ints:
    """Place of each head in the order of falling prices, int64 [head]."""
    return np.argsort(np.argsort(-price, kind="stable"), kind="stable")


def head_order(owner: Ints) -> Ints:
    """timm's head in each place, int64 [block, place], once every rank's heads lie together in the order of ranks."""
    return np.argsort(owner, axis=1, kind="stable")


def permute_heads(model: nn.Module, order: Ints) -> None:
    """Put head order[block, place] into each place, in the model's own parameters; its function stays the same.

    order: int64 [block, place], a permutation in every block. `permute_heads(model, np.argsort(order, axis=1))` undoes
    it, as every export must: checkpoints are in timm's order. Raises PlanError if `order` is none.
    """
    import torch

    from d2ft_hpc.model.subnets import SubnetMap

    subnets = SubnetMap.of(model)
    if order.shape != subnets.shape or (np.sort(order, axis=1) != np.arange(subnets.num_heads)).any():
        raise PlanError(
            f"A head order must be a permutation of {subnets.num_heads} heads for each of {subnets.num_blocks} blocks."
        )
    with torch.no_grad():
        for block, name, parameter in subnets.parameters(model):
            heads = torch.from_numpy(order[block]).to(parameter.device)
            parameter.copy_(subnets.head_axes[name].select(parameter, heads))
