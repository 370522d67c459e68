"""What replicas reduce under a plan: all gradients, but for those of blocks that no replica trains in a step."""

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
    """Lets DeepSpeed leave out the blocks that no replica trains, where that changes nothing."""
    if engine.zero_optimization_stage() != 0:
        return
    block_of = {
        id(parameter): int(name.split(".")[1])
        for name, parameter in model.named_parameters()
        if name.startswith("blocks.")
    }

    def is_needed(parameter: nn.Parameter) -> bool:
        block = block_of.get(id(parameter))
        return block is None or bool(trained_blocks(executor.plan, executor.subnets.num_blocks)[block])

    reduce_needed_gradients(engine, is_needed)
