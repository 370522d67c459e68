"""What replicas reduce under a plan: all gradients except those of blocks that no replica trains in a step."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from d2ft_hpc.engines.deepspeed_private import reduce_needed_gradients
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.planning import Operation, SkipPlan


def trained_blocks(plan: SkipPlan | None, blocks: int) -> np.ndarray:
    """Which blocks have a FULL head in some micro-batch of some replica, bool [block]. All, without a plan."""
    if plan is None:
        return np.ones(blocks, dtype=bool)
    trained: np.ndarray = (plan.operations == Operation.FULL).any(axis=(0, 2))
    return trained


def reduce_trained_blocks(engine: Any, model: nn.Module, executor: PlanExecutor) -> None:
    """Lets DeepSpeed leave out the gradients of blocks that no replica trains, where that changes no result."""
    if engine.zero_optimization_stage() != 0:
        return
    block_of = [
        place[0] if (place := executor.subnets.place_of(name)) is not None else None
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]

    def needed() -> list[bool]:
        trained = trained_blocks(executor.plan, executor.subnets.num_blocks)
        return [block is None or bool(trained[block]) for block in block_of]

    reduce_needed_gradients(engine, needed)
