"""Head placement: which tensor-parallel rank holds which head, and the same model with its heads in that order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.problem import Ints

if TYPE_CHECKING:
    from torch import nn


def in_order(blocks: int, heads: int, ranks: int) -> Ints:
    """The owner map int64 [block, head] of the usual placement: equally many heads to each rank, in timm's order.

    Raises PlanError if the heads cannot be divided evenly.
    """
    if ranks < 1 or heads % ranks:
        raise PlanError(f"{heads} heads cannot be divided evenly over {ranks} ranks.")
    return np.tile(np.repeat(np.arange(ranks), heads // ranks), (blocks, 1))


def snake(score: npt.ArrayLike, ranks: int) -> Ints:
    """An owner map int64 [block, head] that gives every rank of a block its share of strong and weak heads.

    score: float [block, head], or [row, block, head], of which the mean over the rows counts.

    The heads are dealt from the strongest to the weakest, to ranks 0, 1, ..., n-1, n-1, ..., 1, 0, 0, 1, ...: ranks
    that run equally many heads then lose little against a free choice. Raises PlanError as `in_order` does.
    """
    score = np.asarray(score, dtype=np.float64)
    if score.ndim == 3:
        score = score.mean(axis=0)
    blocks, heads = score.shape
    in_order(blocks, heads, ranks)
    there_and_back = np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]])
    deal = np.resize(there_and_back, heads)
    owner = np.empty((blocks, heads), dtype=np.int64)
    strongest_first = np.argsort(-score, axis=1, kind="stable")
    np.put_along_axis(owner, strongest_first, np.tile(deal, (blocks, 1)), axis=1)
    return owner


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
