"""What engines share whose ranks hold a part of the model each: cutting the model, and putting it together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.launch import Control
from d2ft_hpc.parallel.gather import gather_into
from d2ft_hpc.parallel.layout import Placement
from d2ft_hpc.parallel.messages import ReplicatedTokens
from d2ft_hpc.parallel.part import ModelPart
from d2ft_hpc.parallel.tensor import share_blocks

PLACEMENT = "placement.json"
"""What a checkpoint calls the file that says which rank held what."""

MakeOptimizer = Callable[[VisionTransformer], tuple[Optimizer, LRScheduler]]
"""Makes optimiser and schedule for a model or a part of one."""


def share_part(
    part: ModelPart, executor: PlanExecutor, placement: Placement, group: distributed.ProcessGroup
) -> PlanExecutor:
    """Cuts a part by head over a tensor-parallel group; returns the executor that its blocks follow from now on."""
    layout = placement.layout
    if layout.tensor_ranks > 1:
        messages = ReplicatedTokens(group, layout.tensor_rank)
        blocks = {int(index): block for index, block in part.blocks.items()}
        executor = part.executor = share_blocks(blocks, executor, placement.owner, messages)
    for parameter in part.parameters():
        if layout.tensor_rank == 0:
            # DeepSpeed counts these in gradient norms on every rank, all others on the first of all stages only.
            parameter.model_parallel = True
    return executor


@contextmanager
def full_model(
    model: VisionTransformer, part: nn.Module, executor: PlanExecutor, placement: Placement, control: Control
) -> Iterator[VisionTransformer]:
    """The whole `model` with the trained weights of all ranks' parts; entered by all ranks together."""
    gather_into(
        model,
        part,
        _full_precision,
        subnets=executor.subnets,
        layout=placement.layout,
        stage=placement.stage,
        owner=placement.owner,
        control=control,
    )
    yield model


def _full_precision(parameter: nn.Parameter) -> Tensor:
    """The optimiser's fp32 weights where it keeps such."""
    import deepspeed

    full = deepspeed.utils.safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if full is not None:
        return full  # type: ignore[no-any-return]
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().to(torch.float32, copy=True)
