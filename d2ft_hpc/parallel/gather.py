"""The whole model from the parts that ranks hold: timm's names and head indices, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from safetensors.torch import load, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from d2ft_hpc.launch import Control
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.parallel.head_split import join_block
from d2ft_hpc.parallel.layout import Layout
from d2ft_hpc.planning.problem import Ints


def gather_into(
    model: VisionTransformer,
    part: nn.Module,
    read: Callable[[nn.Parameter], Tensor],
    *,
    subnets: SubnetMap,
    layout: Layout,
    stage: Ints,
    owner: Ints,
    control: Control,
) -> None:
    """Copies the weights that all ranks' parts hold into the whole `model`; on all ranks together.

    read: a parameter's current value, of its own shape. stage: int64 [block]; owner: int64 [block, head], timm's heads.
    A block at a time goes over the control plane.
    """
    values = {
        name: read(parameter).detach().cpu().contiguous() for name, parameter in part.named_parameters()
    }
    targets = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in _gathered(values, subnets, layout, stage, owner, control):
            targets[name].copy_(value)


def _gathered(
    values: Mapping[str, Tensor],
    subnets: SubnetMap,
    layout: Layout,
    stage: Ints,
    owner: Ints,
    control: Control,
) -> Iterator[tuple[str, Tensor]]:
    for block in range(subnets.num_blocks):
        prefix = f"blocks.{block}."
        own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        packed = control.all_gather(save(own) if own and layout.replica == 0 else b"")
        holders = [
            layout.rank_of(stage=int(stage[block]), tensor_rank=tensor_rank)
            for tensor_rank in range(layout.tensor_ranks)
        ]
        whole = join_block([load(packed[rank]) for rank in holders], subnets, owner, block)
        yield from ((prefix + name, value) for name, value in whole.items())
    rest = {name: value for name, value in values.items() if not name.startswith("blocks.")}
    packed = control.all_gather(
        save(rest) if rest and layout.replica == 0 and layout.tensor_rank == 0 else b""
    )
    for part in packed:
        if part:
            yield from load(part).items()
