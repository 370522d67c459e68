"""`d2ft_hpc.prepare`: plans in a loop of the user's own over torch's DDP or FSDP2."""

from __future__ import annotations

from typing import Literal

from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from d2ft_hpc.engines.ddp import follow_ddp
from d2ft_hpc.engines.fsdp import follow_fsdp
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.model.lora import unwrapped


def prepare(
    model: nn.Module, executor: PlanExecutor, *, reduced_in: Literal["every", "last"] = "every"
) -> None:
    """Fits the executor that `attach` gave to the DDP or FSDP2 model that was made of the attached model since.

    model: `DistributedDataParallel(model)`, or the model after `fully_shard` of each block and of the model. Its
        replicas may follow different rows of a plan: `executor.load(plan, replica=...)`, which from now on refuses
        plans for another number of replicas.
    reduced_in: the micro-batches of a batch in whose backward gradients are reduced: "last" where all others run under
        `no_sync()` or `set_requires_gradient_sync(False)`, which fills up fewer absent gradients.

    Raises ConfigError where plans could not be run exactly.
    """
    reduction = {"every": Reduction.EVERY_MICRO_BATCH, "last": Reduction.LAST_MICRO_BATCH}[reduced_in]
    if isinstance(model, DistributedDataParallel):
        follow_ddp(model, executor, reduction)
    elif isinstance(unwrapped(model), VisionTransformer) and isinstance(model, FSDPModule):
        follow_fsdp(model, executor, reduction)
    else:
        raise ConfigError(
            f"prepare takes DistributedDataParallel(model), or a timm model after fully_shard (FSDP2), not a "
            f"{type(model).__name__}"
        )
