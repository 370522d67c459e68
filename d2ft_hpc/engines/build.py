"""The engine that a configuration asks for."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2ft_hpc.config import RunConfig
from d2ft_hpc.engines.engine import Engine, LossFunction
from d2ft_hpc.engines.kinds.kind import Request
from d2ft_hpc.engines.optimizer import build_optimizer, build_schedule
from d2ft_hpc.errors import ConfigError, UnsupportedModelError
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.families.table import family_of
from d2ft_hpc.launch import Control
from d2ft_hpc.parallel.rank_layout import Placement


def build_engine(
    config: RunConfig,
    model: nn.Module,
    executor: PlanExecutor,
    placement: Placement,
    total_steps: int,
    loss_function: LossFunction,
    control: Control,
) -> Engine:
    """The engine that the configuration asks for; all ranks call it together. Raises ConfigError where the engine
    cannot run what is asked. model: the whole one; where each rank holds only a part of it, the engine trains a copy
    of that part.
    """
    if config.engine.activation_checkpointing:
        try:
            family_of(model).recompute(model)
        except UnsupportedModelError as error:
            raise ConfigError(f"engine.activation_checkpointing=true: {error}") from None

    def make_optimizer(part: nn.Module) -> tuple[Optimizer, LRScheduler]:
        optimizer = build_optimizer(part, config.optimizer)
        return optimizer, build_schedule(optimizer, config.optimizer, total_steps)

    return config.engine.kind.build(
        Request(config, model, executor, placement, make_optimizer, loss_function, control)
    )
