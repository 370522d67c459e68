"""Fits plans to what a user's loop has made of an attached model: plain torch, DDP or FSDP2."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from d2ft_hpc.engines.ddp import bind_ddp
from d2ft_hpc.engines.fsdp import bind_fsdp
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.families.table import find_backbone
from d2ft_hpc.planning.communication_volume import DataParallel

_OTHERS = {
    "deepspeed.runtime.engine": "DeepSpeed's engine, here or inside Accelerate, Lightning or a Trainer: make it by "
    "d2ft_hpc.initialize, or train with DDP or FSDP2",
    "torch.distributed.fsdp.fully_sharded_data_parallel": "FullyShardedDataParallel (FSDP1): use fully_shard (FSDP2), "
    "which Accelerate calls fsdp_version=2",
}
"""Engines of others by the module whose forward calls the model, and what to do."""


class Bound(Protocol):
    """What `attach` gives."""

    def bind(self, model: nn.Module) -> str: ...


def prepare(model: nn.Module, attached: PlanExecutor | Bound) -> None:
    """Fits what `attach` gave to what was made of the attached model since; says what that is on rank 0.

    Not needed after `d2ft_hpc.attach`, whose first forward does so; it says early where plans could not be run.

    model: `DistributedDataParallel(model)`, or the model after `fully_shard` of each block and of the model. Its
        replicas may follow different rows of a plan: `executor.activate(plan, replica=...)`, which from now on refuses
        plans for another number of replicas. Or the model as it is, so that one script serves 1 to N ranks.

    Micro-batches whose gradients are only kept run under `no_sync()` or `set_requires_gradient_sync(False)` as always;
    any one may be that which reduces them, as the last of an incomplete batch at the end of an epoch.

    Raises ConfigError where plans could not be run exactly.
    """
    found = bind_engine(model, attached)[0] if isinstance(attached, PlanExecutor) else attached.bind(model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"d2ft: prepared {found}", flush=True)


def bind_engine(
    model: nn.Module, executor: PlanExecutor, slot_source: Callable[[], int] | None = None
) -> tuple[str, DataParallel | None]:
    """Binds the executor to DDP, FSDP2 or the model as it is, and returns which, in words and by name. Raises
    ConfigError as `prepare`."""
    for caller, fix in _OTHERS.items():
        if _is_called_by(caller):
            raise ConfigError(f"attach does not fit plans to {fix}")
    if isinstance(model, DistributedDataParallel):
        bind_ddp(model, executor, slot_source=slot_source)
        return f"DDP over {dist.get_world_size(model.process_group)} ranks", "ddp"
    backbone = find_backbone(model)
    if backbone is None:
        raise ConfigError(
            f"prepare takes DistributedDataParallel(model), a supported model after fully_shard (FSDP2), or as it is, "
            f"each also inside a module of one's own, not a {type(model).__name__}"
        )
    for spread in (model, backbone):
        if isinstance(spread, FSDPModule):
            bind_fsdp(spread, executor, slot_source=slot_source)
            return f"FSDP2 over {dist.get_world_size()} ranks", "fsdp2"
    executor.bind(slot_source, Reduction.AFTER_BACKWARD)
    return "the model by itself, whose gradients no engine reduces", None


def _is_called_by(module: str) -> bool:
    """Whether a function of the Python module of this name is under way."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None
