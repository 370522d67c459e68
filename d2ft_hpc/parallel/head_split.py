"""Blocks cut by head: each rank keeps the rows and columns of the heads that the owner map gives it.

The owner map is int64 [block, head] in timm's head indices, with the rank that holds each head. In a rank's
parameters its heads are ordered by their indices. Ranks may hold different numbers of heads, and other heads in each
block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2ft_hpc.errors import PlanError, UnsupportedModelError
from d2ft_hpc.families.family import BlockFamily
from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.planning.arrays import Ints


def even_owner(blocks: int, heads: int, ranks: int) -> Ints:
    """The owner map that gives each rank a run of neighbouring heads; the numbers differ by at most one.

    Raises PlanError if there are more ranks than heads.
    """
    if not 1 <= ranks <= heads:
        raise PlanError(
            f"{heads} heads cannot be divided over {ranks} tensor-parallel ranks: use at most {heads}"
        )
    return np.tile(np.arange(heads) * ranks // heads, (blocks, 1))


def check_owner(owner: Ints, shape: tuple[int, int], ranks: int) -> None:
    """Raises PlanError unless `owner` maps every head of `shape` to one of `ranks`, each with a head in each block."""
    if owner.shape != shape:
        raise PlanError(f"the owner map is for {owner.shape} blocks and heads, the model has {shape}")
    for block, row in enumerate(owner):
        if set(row.tolist()) != set(range(ranks)):
            raise PlanError(
                f"the owner map of block {block} names the ranks {sorted(set(row.tolist()))}; each of the {ranks} "
                f"tensor-parallel ranks must hold at least one head of each block"
            )


def check_parts(family: BlockFamily) -> None:
    """Raises UnsupportedModelError where ranks cannot hold parts of a model of this family."""
    if family.refuses_parts is not None:
        raise UnsupportedModelError(f"{family.refuses_parts}: use neither tensor parallelism nor a pipeline")


def heads_of(owner: Ints, block: int, rank: int) -> Tensor:
    """The heads of a block that a rank holds, int64 [n], timm's indices in rising order."""
    return torch.from_numpy(np.flatnonzero(owner[block] == rank))


def cut_block(block: nn.Module, subnets: SubnetMap, heads: Tensor) -> None:
    """Leaves in a block only the parameters of these heads and those that no head owns. Where heads have unequal
    shares of the hidden units, each gets the largest share, padded with units of zeros, which stay zero.

    The parameters that are cut are new ones, marked `tensor_model_parallel` as DeepSpeed and Megatron do.
    """
    for name, whole in list(block.named_parameters()):
        if name not in subnets.head_axes:
            continue
        part = subnets.head_axes[name].select(whole.detach(), heads.to(whole.device)).clone()
        parameter = nn.Parameter(part, requires_grad=whole.requires_grad)
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        replace_parameter(block, name, parameter)
    for name in subnets.layers:
        layer: Any
        for layer in block.get_submodule(name).modules():  # itself, or what LoRA made of it
            if isinstance(getattr(layer, "weight", None), Tensor):
                layer.out_features, layer.in_features = layer.weight.shape
    subnets.family.set_heads(block, heads.numel())


def replace_parameter(block: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replaces the parameter of that name."""
    module, last = name.rsplit(".", 1)
    setattr(block.get_submodule(module), last, parameter)


def join(axis: HeadAxis, parts: Sequence[Tensor], heads: Sequence[Tensor]) -> Tensor:
    """The whole parameter in timm's order from every rank's part and heads; undoes `HeadAxis.select`."""
    whole = parts[0].new_zeros(axis.parameter_shape)
    for part, its_heads in zip(parts, heads, strict=True):
        axis.put(part, its_heads.to(part.device), whole)
    return whole


def join_block(
    parts: Sequence[Mapping[str, Tensor]], subnets: SubnetMap, owner: Ints, block: int
) -> dict[str, Tensor]:
    """A block's parameters by their names inside the block, from the parts of all tensor-parallel ranks."""
    heads = [heads_of(owner, block, rank) for rank in range(len(parts))]
    return {
        name: join(subnets.head_axes[name], [part[name] for part in parts], heads)
        if name in subnets.head_axes
        else tensor
        for name, tensor in parts[0].items()
    }
