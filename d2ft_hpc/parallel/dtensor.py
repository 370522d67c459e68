"""The same cut by head with torch's DTensor: a rank's part is the local part of a parameter over a tensor mesh.

The ranks' parts, one after the other, are the DTensor: its rows or columns are timm's in another order (a rank's
queries, keys and values of a fused `qkv` lie together). `to_timm` and `from_timm` go from one order to the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from d2ft_hpc.errors import PlanError
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.gradients import Owners, stand_ins
from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.parallel.head_split import even_owner, heads_of, join, replace_parameter
from d2ft_hpc.parallel.tensor import TensorParallelExecutor, share_blocks
from d2ft_hpc.planning.arrays import Ints


class DTensorExecutor(TensorParallelExecutor):
    """Runs blocks whose parameters are DTensors, each rank with its local parts; made by `split_heads`."""

    def run(self, block: nn.Module, index: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cut: Owners = [
            (module._parameters, name)
            for module in block.modules()
            for name, parameter in module._parameters.items()
            if isinstance(parameter, DTensor)
        ]
        with stand_ins(cut, [kept[name].to_local() for kept, name in cut]):
            return super().run(block, index, x, *args, **kwargs)

    def to_timm(self, name: str, joined: Tensor) -> Tensor:
        """The parameter of that name in the model (or its moment), from the DTensor's full tensor."""
        axis, heads = self._cut_of(name)
        if axis is None:
            return joined
        return join(axis, joined.chunk(len(heads), dim=0 if axis.splits_rows else 1), heads)

    def from_timm(self, name: str, tensor: Tensor) -> Tensor:
        """Undoes `to_timm`."""
        axis, heads = self._cut_of(name)
        if axis is None:
            return tensor
        return torch.cat(
            [axis.select(tensor, of_rank) for of_rank in heads], dim=0 if axis.splits_rows else 1
        )

    def _cut_of(self, name: str) -> tuple[HeadAxis | None, list[Tensor]]:
        """How the parameter is cut by head, and each rank's heads."""
        place = self.subnets.place_of(name)
        if place is None:
            return None, []
        block, inner = place
        ranks = range(self.messages.group.size())
        return self.subnets.head_axes.get(inner), [heads_of(self.owner, block, rank) for rank in ranks]


def split_heads(
    model: nn.Module, executor: PlanExecutor, mesh: DeviceMesh, owner: Ints | None = None
) -> DTensorExecutor:
    """Cuts an attached model's blocks by head over a mesh of 1 dimension, in place, as `parallelize_module` does.

    owner: int64 [block, head], the place in the mesh of each head; None: runs of neighbouring heads. Returns the
    executor that the blocks follow from now on. All ranks of the mesh must follow the same rows of a plan and get the
    same images. `fully_shard` over another dimension of the mesh comes afterwards.

    Raises PlanError if the ranks would hold different numbers of heads, which no DTensor can express, and
    UnsupportedModelError as `share_blocks`.
    """
    if owner is None:
        owner = even_owner(*executor.subnets.shape, mesh.size())
    counts = np.array([(owner == rank).sum(axis=1) for rank in range(mesh.size())])
    if (counts != counts[0]).any():
        raise PlanError(
            f"{executor.subnets.num_heads} heads cannot be divided evenly over {mesh.size()} tensor-parallel ranks, "
            f"and DTensor has equal parts only: use a divisor of {executor.subnets.num_heads}, or DeepSpeed"
        )
    shared = share_blocks(dict(executor.blocks), executor, owner, mesh.get_group(), None, DTensorExecutor)
    assert isinstance(shared, DTensorExecutor)
    for block in executor.subnets.blocks(model):
        for name, part in list(block.named_parameters()):
            if axis := executor.subnets.head_axes.get(name):
                placement = Shard(0 if axis.splits_rows else 1)
                joined = DTensor.from_local(part.detach(), mesh, [placement], run_check=False)
                replace_parameter(block, name, nn.Parameter(joined, requires_grad=part.requires_grad))
    return shared
