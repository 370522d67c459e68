"""Whole tensors from the parts that ranks hold, and back: timm's names and head indices, whatever the layout."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors.torch import load, save
from torch import Tensor

from d2ft_hpc.launch import Control
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.parallel.head_split import heads_of, join_block
from d2ft_hpc.parallel.rank_layout import Placement


def gather_full_tensors(
    part: Mapping[str, Tensor], subnets: SubnetMap, placement: Placement, control: Control
) -> dict[str, Tensor]:
    """The whole model's tensors on every rank, on the CPU; on all ranks together.

    part: this rank's by timm's names; any that have a parameter's shape (weights, moments of an optimiser).
    A block at a time goes over the control plane.
    """
    layout, stage = placement.layout, placement.stage
    values = {name: value.detach().cpu().contiguous() for name, value in part.items()}
    whole: dict[str, Tensor] = {}
    for block in range(subnets.num_blocks):
        prefix = f"{subnets.family.blocks_path}.{block}."
        own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        packed = control.all_gather(save(own) if own and layout.replica == 0 else b"")
        holders = [
            layout.rank_of(stage=int(stage[block]), tensor_rank=tensor_rank)
            for tensor_rank in range(layout.tensor_ranks)
        ]
        if packed[holders[0]]:
            joined = join_block([load(packed[rank]) for rank in holders], subnets, placement.owner, block)
            whole |= {prefix + name: value for name, value in joined.items()}
    rest = {name: value for name, value in values.items() if subnets.place_of(name) is None}
    speaks = rest and layout.replica == 0 and layout.tensor_rank == 0
    for packed_rest in control.all_gather(save(rest) if speaks else b""):
        whole |= load(packed_rest) if packed_rest else {}
    return whole


def part_of(
    whole: Mapping[str, Tensor], names: set[str], subnets: SubnetMap, placement: Placement
) -> dict[str, Tensor]:
    """This rank's part of the tensors that have these names; undoes `gather_full_tensors`."""
    part: dict[str, Tensor] = {}
    for name in names & whole.keys():
        tensor = whole[name]
        place = subnets.place_of(name)
        if place is not None and place[1] in subnets.head_axes:
            block, inner = place
            heads = heads_of(placement.owner, block, placement.layout.tensor_rank)
            tensor = subnets.head_axes[inner].select(tensor, heads)
        part[name] = tensor
    return part
