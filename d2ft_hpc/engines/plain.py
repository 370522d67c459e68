"""One process, plain PyTorch: the engine without DeepSpeed, and the reference of every other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2ft_hpc.engines.check import check_plan, check_recompute
from d2ft_hpc.engines.engine import (
    LossFunction,
    MicroBatch,
    ShortOfMemory,
    StateWriter,
    StepReport,
    zero_missing_gradients,
)
from d2ft_hpc.engines.out_of_memory import repeatable
from d2ft_hpc.engines.portable import (
    PortableState,
    collect_plain,
    restore_plain,
    restore_schedule,
    schedule_numbers,
)
from d2ft_hpc.execution.cuda_graph import CudaGraphs
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
        cuda_graphs: bool = False,
    ) -> None:
        """cuda_graphs: whether the forward and backward of a micro-batch under a dense plan is one CUDA graph; its time
        then counts as backward."""
        self._model, self.executor = model, executor
        self._optimizer, self._schedule = optimizer, schedule
        self._loss_function = loss_function
        self._autocast_dtype = autocast_dtype
        self._max_norm = float("inf") if gradient_clipping is None else gradient_clipping
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._graphs: dict[int, CudaGraphs] | None = {} if cuda_graphs else None
        self.short_of_memory: ShortOfMemory | None = None

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepReport:
        report = StepReport(learning_rate=self._optimizer.param_groups[0]["lr"])
        self._model.train()

        def passes() -> list[Tensor]:
            losses = []
            for slot, (images, labels) in enumerate(micro_batches):
                with self.executor.micro_batch(slot):
                    losses.append(self._accumulate(report, images, labels, len(micro_batches)))
            return losses

        losses = repeatable(self.short_of_memory, self._optimizer.zero_grad, passes)
        with report.timed("optimizer"):
            zero_missing_gradients(self._model)
            report.gradient_norm = nn.utils.clip_grad_norm_(self._trained, self._max_norm)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad(set_to_none=self._graphs is None)
        report.loss = torch.stack(losses).mean()
        return report

    def _accumulate(self, report: StepReport, images: Tensor, labels: Tensor, micro_batches: int) -> Tensor:
        """Adds a micro-batch's share of the gradient; returns its loss."""
        if self._graphs is None or not self.executor.is_dense:
            with report.timed("forward"):
                loss = self._loss(images, labels)
            with report.timed("backward"):
                torch.autograd.backward(loss / micro_batches)
            return loss.detach()

        def both(images: Tensor, labels: Tensor) -> Tensor:
            loss = self._loss(images, labels)
            torch.autograd.backward(loss / micro_batches)
            return loss.detach()

        zero_missing_gradients(self._model)  # a graph adds to gradients that are there when it is captured
        graphs = self._graphs.setdefault(micro_batches, CudaGraphs(both, self._gradients))
        with report.timed("backward"):
            return graphs(images, labels).clone()

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._trained if parameter.grad is not None]

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._autocast(images.device):
            return self._loss_function(self._model(images), labels)

    @property
    def same_rows(self) -> str | None:
        return None

    def check(self, plan: SkipPlan) -> None:
        check_recompute(self._model)
        check_plan(plan, slots=plan.slots, replicas=1, same_rows=None)

    def full_model(self) -> AbstractContextManager[VisionTransformer]:
        return nullcontext(self._model)

    def save(self, folder: Path, write: StateWriter) -> None:
        state = collect_plain(self._model, self._optimizer)
        state.schedule = schedule_numbers(self._schedule)
        state.save(folder, write)

    def load(self, folder: Path) -> None:
        state = PortableState.load(folder)
        state.check_fits({name: tensor.shape for name, tensor in self._model.state_dict().items()})
        restore_plain(state, self._model, self._optimizer)
        restore_schedule(self._schedule, state.schedule)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self._autocast_dtype, cache_enabled=False)
