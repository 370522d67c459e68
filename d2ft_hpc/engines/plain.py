"""One process, plain PyTorch: the engine without DeepSpeed, and the reference of every other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2ft_hpc.engines.check import check_plan, check_recompute
from d2ft_hpc.engines.engine import LossFunction, MicroBatch, StepReport, zero_missing_gradients
from d2ft_hpc.engines.portable import (
    PortableState,
    collect_plain,
    restore_plain,
    restore_schedule,
    schedule_numbers,
)
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.planning import SkipPlan


class PlainEngine:
    """Accumulates the gradients of a batch's micro-batches and steps the optimiser."""

    def __init__(
        self,
        model: nn.Module,
        executor: PlanExecutor,
        optimizer: Optimizer,
        schedule: LRScheduler,
        loss_function: LossFunction,
        *,
        autocast_dtype: torch.dtype | None = None,
        gradient_clipping: float | None = None,
    ) -> None:
        self._model, self.executor = model, executor
        self._optimizer, self._schedule = optimizer, schedule
        self._loss_function = loss_function
        self._autocast_dtype = autocast_dtype
        self._max_norm = float("inf") if gradient_clipping is None else gradient_clipping

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepReport:
        report = StepReport(learning_rate=self._optimizer.param_groups[0]["lr"])
        losses = []
        self._model.train()
        for slot, (images, labels) in enumerate(micro_batches):
            with self.executor.micro_batch(slot):
                with report.timed("forward"), self._autocast(images.device):
                    loss = self._loss_function(self._model(images), labels)
                with report.timed("backward"):
                    torch.autograd.backward(loss / len(micro_batches))
            losses.append(loss.detach())
        with report.timed("optimizer"):
            zero_missing_gradients(self._model)
            trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
            report.gradient_norm = float(nn.utils.clip_grad_norm_(trained, self._max_norm))
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
        report.loss = float(torch.stack(losses).mean())
        return report

    @property
    def same_rows(self) -> str | None:
        return None

    def check(self, plan: SkipPlan) -> None:
        check_recompute(self._model)
        check_plan(plan, slots=plan.slots, replicas=1, same_rows=None)

    def full_model(self) -> AbstractContextManager[VisionTransformer]:
        return nullcontext(self._model)

    def save(self, folder: Path) -> None:
        state = collect_plain(self._model, self._optimizer)
        state.schedule = schedule_numbers(self._schedule)
        state.save(folder)

    def load(self, folder: Path) -> None:
        state = PortableState.load(folder)
        state.check_fits({name: tensor.shape for name, tensor in self._model.state_dict().items()})
        restore_plain(state, self._model, self._optimizer)
        restore_schedule(self._schedule, state.schedule)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self._autocast_dtype)
