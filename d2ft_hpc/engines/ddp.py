"""torch's DistributedDataParallel: every rank has the whole model, gradients are averaged during backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import BuiltinCommHookType
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2ft_hpc.engines.check import check_plan, check_recompute
from d2ft_hpc.engines.engine import LossFunction, StateWriter
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.block_graphs import GradientPlace
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.flat_parameters import FlatParameters
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.planning import SkipPlan


def bind_ddp(
    ddp: DistributedDataParallel,
    executor: PlanExecutor,
    reduction: Reduction = Reduction.AS_LOOP_SAYS,
    slot_source: Callable[[], int] | None = None,
    gradient_place: GradientPlace = GradientPlace.COPIED,
) -> None:
    """Fits the executor of `ddp.module` to `ddp`, whose replicas may then follow different rows. Gradients are reduced
    in each micro-batch that does not run under `ddp.no_sync()`.

    reduction: when, in complete batches. slot_source, gradient_place: as `PlanExecutor.bind` takes them.

    Raises ConfigError where plans could not be run exactly.
    """
    if ddp.static_graph:
        raise ConfigError(
            "DistributedDataParallel(static_graph=True) expects the same computation in every step, a plan changes it: "
            "remove static_graph"
        )
    trained = sum(parameter.requires_grad for parameter in ddp.module.parameters())
    reduced = ddp._get_ddp_logging_data()["num_parameter_tensors"]
    if reduced != trained:
        raise ConfigError(
            f"DistributedDataParallel reduces {reduced} parameters, {trained} are trained; it would wait for the rest: "
            f"call attach, which freezes some, before DistributedDataParallel(model)"
        )
    kept = weakref.ref(ddp)  # whose process group ends with it, though the executor may live on

    def check(plan: SkipPlan) -> None:
        if (ddp := kept()) is not None:
            _check(ddp, plan)

    def reduces(block: nn.Module) -> bool:
        ddp = kept()
        return ddp is not None and bool(ddp.require_backward_grad_sync)

    executor.bind(slot_source, reduction, check, reduces, gradient_place=gradient_place)


def _check(ddp: DistributedDataParallel, plan: SkipPlan) -> None:
    check_recompute(ddp.module)
    check_plan(plan, slots=plan.slots, replicas=dist.get_world_size(ddp.process_group))


class DdpEngine(PlainEngine):
    """Trains one replica; gradients are reduced in the last micro-batch. torch.distributed must be initialised."""

    def __init__(
        self,
        model: nn.Module,
        executor: PlanExecutor,
        optimizer: Optimizer,
        schedule: LRScheduler,
        loss_function: LossFunction,
        **options: Any,
    ) -> None:
        """options: those of PlainEngine except `cuda_graphs`."""
        executor.flat = FlatParameters(model, executor.blocks, optimizer.param_groups)
        super().__init__(model, executor, optimizer, schedule, loss_function, **options)
        device = next(model.parameters()).device
        # Gradients stay in the buckets that are reduced and are divided bucket by bucket, so that nothing is launched
        # for each parameter.
        self._keeps_gradients = True
        self._trainer = self._ddp = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
        self._ddp._register_builtin_comm_hook(BuiltinCommHookType.ALLREDUCE)
        bind_ddp(self._ddp, executor, Reduction.LAST_MICRO_BATCH, gradient_place=GradientPlace.OF_ENGINE)

    @contextmanager
    def _micro_batch(self, slot: int, slots: int) -> Iterator[None]:
        reduces = nullcontext() if slot == slots - 1 else self._ddp.no_sync()
        with super()._micro_batch(slot, slots), reduces:
            yield

    def check(self, plan: SkipPlan) -> None:
        _check(self._ddp, plan)

    def save(self, folder: Path, write: StateWriter) -> None:
        if dist.get_rank() == 0:
            super().save(folder, write)
