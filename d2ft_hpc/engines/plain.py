"""One process of plain PyTorch: the engine without DeepSpeed, and the reference for all others."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2ft_hpc.engines.check import check_plan, check_recompute
from d2ft_hpc.engines.engine import (
    LossFunction,
    MicroBatch,
    StateWriter,
    StepReport,
    evaluated,
    set_training,
    zero_missing_gradients,
)
from d2ft_hpc.engines.portable import (
    PortableState,
    collect_plain,
    restore_plain,
    restore_schedule,
    schedule_numbers,
)
from d2ft_hpc.engines.state_bytes import bytes_to_come
from d2ft_hpc.execution.block_runner import MOST_SHAPES
from d2ft_hpc.execution.cuda_graph import CudaGraphs
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.metering.phases import phase
from d2ft_hpc.planning import SkipPlan


class PlainEngine:
    """Accumulates the gradients of a batch's micro-batches and steps the optimiser."""

    same_rows: str | None = None

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
        """cuda_graphs: whether the forward and backward of a micro-batch is one CUDA graph, if the plan has few shapes;
        its time then counts as backward.
        """
        self._model, self.executor = model, executor
        self._trainer = model
        """The module that computes the logits: the model, or a wrapper around it."""
        self._optimizer, self._schedule = optimizer, schedule
        self._loss_function = loss_function
        self._autocast_dtype = autocast_dtype
        self._max_norm = gradient_clipping
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._graphs: dict[Hashable, CudaGraphs[Tensor]] | None = {} if cuda_graphs else None
        if cuda_graphs:
            executor.subnets.family.let_graphs_capture(model)
        self._keeps_gradients = cuda_graphs
        """Gradients stay where they are from step to step."""

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepReport:
        report = StepReport(learning_rate=self._optimizer.param_groups[0]["lr"])
        set_training(self._modules)
        losses = []
        for slot, (images, labels) in enumerate(micro_batches):
            with self._micro_batch(slot, len(micro_batches)):
                losses.append(self._accumulate(slot, images, labels, len(micro_batches)))
        with phase("optimizer"):
            zero_missing_gradients(self._trained)
            report.gradient_norm = self._clip()
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad(set_to_none=not self._keeps_gradients)
        report.loss = torch.stack(losses).mean()
        return report

    @cached_property
    def _modules(self) -> list[nn.Module]:
        return list(self._trainer.modules())

    @contextmanager
    def _micro_batch(self, slot: int, slots: int) -> Iterator[None]:
        """Context around forward and backward of micro-batch `slot` of `slots`."""
        with self.executor.micro_batch(slot):
            yield

    def _clip(self) -> Tensor:
        """Clips the gradients, if asked to; returns their norm before that."""
        norm = nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        if self._max_norm is not None:
            nn.utils.clip_grads_with_norm_(self._trained, self._max_norm, norm)
        return norm

    def _accumulate(self, slot: int, images: Tensor, labels: Tensor, micro_batches: int) -> Tensor:
        """Adds a micro-batch's share of the gradient; returns its loss."""
        if self._graphs is None or self.executor.micro_batch_shapes > MOST_SHAPES:
            with phase("forward"):
                loss = self._loss(images, labels)
            with phase("backward"):
                torch.autograd.backward(loss / micro_batches)
            return loss.detach()

        def both(images: Tensor, labels: Tensor, *indices: Tensor) -> Tensor:
            with self.executor.reading(slot, *indices) if indices else nullcontext():
                loss = self._loss(images, labels)
                torch.autograd.backward(loss / micro_batches)
            return loss.detach()

        zero_missing_gradients(self._trained)  # a graph adds to the gradients that exist when it is captured
        row = self.executor.rows[slot] if self.executor.rows else None
        key = (micro_batches, None if row is None else row.shape)
        row = None if self.executor.is_dense else row  # dense blocks read no indices
        if key not in self._graphs and len(self._graphs) >= 2 * MOST_SHAPES:
            self._graphs.clear()  # removes the graphs of earlier plans, which would keep their memory for good
        graphs = self._graphs.setdefault(key, CudaGraphs(self._gradients))
        with phase("backward"):
            return graphs(both, images, labels, *([] if row is None else [row.indices])).clone()

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._trained if parameter.grad is not None]

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._autocast(images.device):
            return self._loss_function(self._trainer(images), labels)

    @property
    def bytes_to_come(self) -> float:
        return bytes_to_come(self._trained, self._optimizer)

    def check(self, plan: SkipPlan) -> None:
        check_recompute(self._model)
        check_plan(plan, slots=plan.slots, replicas=1)

    def logits(self, images: Sequence[Tensor]) -> list[Tensor]:
        with self._autocast(images[0].device):
            return evaluated(self._model, images)

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        flat = self.executor.flat
        with nullcontext() if flat is None else flat.unflattened():
            yield self._model

    def save(self, folder: Path, write: StateWriter) -> None:
        state = collect_plain(self._model, self._optimizer)
        state.schedule = schedule_numbers(self._schedule)
        state.with_parts(self.executor.flat).write(folder, write)

    def restore(self, folder: Path) -> None:
        state = PortableState.read(folder).with_flats(self.executor.flat)
        state.check_fits({name: tensor.shape for name, tensor in self._model.state_dict().items()})
        restore_plain(state, self._model, self._optimizer)
        restore_schedule(self._schedule, state.schedule)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self._autocast_dtype, cache_enabled=False)
