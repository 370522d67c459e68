"""The same model with its heads in another order: as ranks hold them, and back to timm's order for every export."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d2ft_hpc.errors import PlanError
from d2ft_hpc.model.subnets import SubnetMap

Order = npt.NDArray[np.int64]


def place_heads(state: Mapping[str, Tensor], subnets: SubnetMap, order: Order) -> dict[str, Tensor]:
    """The state_dict of a model in timm's order, with timm's head order[block, place] in each place.

    state: timm's names; what no subnet owns stays the same tensor, the rest is copied. order: int64 [block, place], as
    `planning.head_order` makes it from an owner map. The model's function stays the same. Raises PlanError if `order`
    is no permutation in every block.
    """
    if order.shape != subnets.shape or (np.sort(order, axis=1) != np.arange(subnets.num_heads)).any():
        raise PlanError(
            f"A head order must be a permutation of {subnets.num_heads} heads for each of {subnets.num_blocks} blocks."
        )
    placed = dict(state)
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, block, inner = name.split(".", 2)
            if inner in subnets.head_axes:
                heads = torch.from_numpy(order[int(block)]).to(tensor.device)
                placed[name] = subnets.head_axes[inner].select(tensor, heads)
    return placed


def unplace_heads(state: Mapping[str, Tensor], subnets: SubnetMap, order: Order) -> dict[str, Tensor]:
    """Undoes `place_heads` with the same order: the state_dict in timm's order, bit for bit."""
    return place_heads(state, subnets, np.argsort(order, axis=1))
