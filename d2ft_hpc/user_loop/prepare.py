"""`d2ft_hpc.prepare`: plans in a loop of the user's own over plain torch, DDP or FSDP2."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from d2ft_hpc.engines.ddp import follow_ddp
from d2ft_hpc.engines.fsdp import follow_fsdp
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.families.table import find_family
from d2ft_hpc.model.lora import unwrapped


def prepare(model: nn.Module, executor: PlanExecutor) -> None:
    """Fits the executor that `attach` gave to what was made of the attached model since; says what that is on rank 0.

    model: `DistributedDataParallel(model)`, or the model after `fully_shard` of each block and of the model. Its
        replicas may follow different rows of a plan: `executor.load(plan, replica=...)`, which from now on refuses
        plans for another number of replicas. Or the model as it is, so that one script serves 1 to N ranks.

    Micro-batches whose gradients are only kept run under `no_sync()` or `set_requires_gradient_sync(False)` as always;
    any one may be that which reduces them, as the last of an incomplete batch at the end of an epoch.

    Raises ConfigError where plans could not be run exactly.
    """
    if isinstance(model, DistributedDataParallel):
        follow_ddp(model, executor)
        found = f"DDP over {dist.get_world_size(model.process_group)} ranks"
    elif (is_known := find_family(unwrapped(model)) is not None) and isinstance(model, FSDPModule):
        follow_fsdp(model, executor)
        found = f"FSDP2 over {dist.get_world_size()} ranks"
    elif is_known:
        executor.follow(None, Reduction.AFTER_BACKWARD)
        found = "the model by itself, whose gradients no engine reduces"
    else:
        raise ConfigError(
            f"prepare takes DistributedDataParallel(model), a timm model after fully_shard (FSDP2), or a timm model as "
            f"it is, not a {type(model).__name__}"
        )
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"d2ft: prepared {found}", flush=True)
