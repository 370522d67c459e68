"""One process, plain PyTorch: the engine without DeepSpeed, and the reference of every other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2ft_hpc.engines.engine import LossFunction, MicroBatch, StateWriter, StepReport, zero_missing_gradients
from d2ft_hpc.execution.executor import PlanExecutor


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
        self._model, self._executor = model, executor
        self._optimizer, self._schedule = optimizer, schedule
        self._loss_function = loss_function
        self._autocast_dtype = autocast_dtype
        self._max_norm = float("inf") if gradient_clipping is None else gradient_clipping

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepReport:
        report = StepReport(learning_rate=self._optimizer.param_groups[0]["lr"])
        losses = []
        self._model.train()
        for slot, (images, labels) in enumerate(micro_batches):
            with self._executor.micro_batch(slot):
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

    def save(self, folder: Path, write: StateWriter) -> None:
        state = {"optimizer": self._optimizer.state_dict(), "schedule": self._schedule.state_dict()}
        write({"model": self._model.state_dict(), **state}, folder / "plain.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "plain.pt", weights_only=True, map_location="cpu")
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self._autocast_dtype)
