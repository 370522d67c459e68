"""DeepSpeed's data parallelism, ZeRO stages 0 to 3, in the training loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2ft_hpc.engines.check import check_plan, check_recompute
from d2ft_hpc.engines.deepspeed_keys import zero_stage
from d2ft_hpc.engines.deepspeed_private import (
    after_moves,
    cast_buffers,
    import_deepspeed,
    name_parts,
    take_step,
    whole,
)
from d2ft_hpc.engines.deepspeed_settings import check_settings
from d2ft_hpc.engines.engine import LossFunction, MicroBatch, StateWriter, StepReport, evaluated, set_training
from d2ft_hpc.engines.portable import PortableState, restore_schedule, schedule_numbers
from d2ft_hpc.engines.replicas import reduce_trained_blocks
from d2ft_hpc.engines.state_bytes import bytes_to_come
from d2ft_hpc.engines.zero import ZeroRules, with_linear_of_torch
from d2ft_hpc.engines.zero_state import collect, restore
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.flat_parameters import FlatParameters
from d2ft_hpc.metering.phases import phase
from d2ft_hpc.planning import SkipPlan

OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
)
"""Keys of DeepSpeed's configuration that follow from the run's own."""


def deepspeed_config(
    settings: Mapping[str, Any],
    *,
    micro_batch_size: int,
    slots: int,
    precision: str,
    gradient_clipping: float | None,
) -> dict[str, Any]:
    """The whole DeepSpeed configuration from the user's own `settings` and the run's.

    Raises ConfigError where `settings` has a key that the run sets, or asks for an engine that cannot run plans.
    """
    for key in OURS:
        if key in settings:
            raise ConfigError(
                f"engine.deepspeed.{key}: set by the run (data.micro_batch_size, data.slots, engine.precision, "
                f"engine.gradient_clipping, optimizer): remove it"
            )
    zero = {**settings.get("zero_optimization", {}), "stage": zero_stage(settings, precision)}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": slots,
        # DeepSpeed clips at 1.0 unless told otherwise.
        "gradient_clipping": gradient_clipping or 0.0,
    }
    if precision != "fp32":
        ours[precision] = {"enabled": True}
    if precision == "bf16":
        # DeepSpeed's check of each gradient takes longer than a step; losses or weights that are not finite end the
        # run.
        ours[precision]["check_grad_overflow"] = False
    quiet = {
        "zero_allow_untested_optimizer": True,
        # Allows torch's own optimisers with offloading, as they are used everywhere else here.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    config = {**quiet, **settings, "zero_optimization": zero, **ours}
    config.pop("tensor_parallel", None)  # blocks are cut by head, not by DeepSpeed
    ZeroRules.of(config, where="engine.deepspeed.")
    check_settings({**quiet, **settings, "zero_optimization": zero}, "engine.deepspeed.")
    return config


class DeepSpeedEngine:
    """Trains through a `deepspeed.initialize` engine. torch.distributed must be initialised."""

    def __init__(
        self,
        model: nn.Module,
        executor: PlanExecutor,
        optimizer: Optimizer | Callable[..., Optimizer] | None,
        schedule: LRScheduler | Callable[..., LRScheduler] | None,
        loss_function: LossFunction,
        config: Mapping[str, Any],
        *,
        slot_source: Callable[[], int] | None = None,
        is_boundary: Callable[[], bool] | None = None,
        flattens: bool = False,
        hides_flat: bool = False,
        **given: Any,
    ) -> None:
        """slot_source: as `PlanExecutor.bind` takes it. is_boundary: as `ZeroRules.prepare` takes it.
        flattens: whether each block's parameters become a few flat ones, below stage 3. hides_flat: whether scripts
        that look at the model find its own parameters nevertheless; with ZeRO 1 and 2 only.
        given: other arguments of `deepspeed.initialize`; optimizer and schedule may have any form that it takes."""
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(auto_mpi_discovery=False)
        self.rules = ZeroRules.of(config)
        if self.rules.stage == 3 and executor.compiles:
            config = with_linear_of_torch(config)
        # Empty, for `full_model`, before the parameters are partitioned.
        self._twin = copy.deepcopy(model).to("meta") if self.rules.stage == 3 else None
        # Stage 3 frees a parameter by giving it another tensor, and views would keep the one that it had.
        if flattens and self.rules.stage < 3:
            groups = _groups(model, optimizer, given.pop("model_parameters", None))
            executor.flat = FlatParameters(model, executor.blocks, groups, keeps_parts=hides_flat)
            if not isinstance(optimizer, Optimizer):
                given["model_parameters"] = groups
        self.rules.prepare(model, executor, slot_source, is_boundary)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.made = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=dict(config),
            **{"model_parameters": self._trained, **given},
        )
        """What `deepspeed.initialize` returned: the engine, its optimizer and its schedule among them."""
        self.engine = self.made[0]
        self._modules = list(self.engine.modules())
        self._model, self.executor, self._loss_function = model, executor, loss_function
        reduce_trained_blocks(self.engine, model, executor)
        self._dtype = next(model.parameters()).dtype
        cast_buffers(executor, self._dtype)
        if executor.flat is not None and hides_flat:
            name_parts(self.engine, executor.flat.parts_of)
            executor.flat.hide()
            after_moves(self.engine, executor.flat.share_memory)

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepReport:
        report = StepReport(learning_rate=self.engine.get_lr()[0])
        set_training(self._modules)
        last = len(micro_batches) - 1
        losses = [
            self._accumulate(slot, micro_batch, is_last=slot == last)
            for slot, micro_batch in enumerate(micro_batches)
        ]
        with phase("optimizer"):
            report.skipped = not take_step(self.engine)
        norm = self.engine.get_global_grad_norm()
        report.gradient_norm = float("nan") if norm is None else norm
        report.loss = torch.stack(losses).mean()
        return report

    def _accumulate(self, slot: int, micro_batch: MicroBatch, is_last: bool) -> Tensor:
        """Adds a micro-batch's gradient; returns its loss. DeepSpeed reduces in the last one's backward."""
        images, labels = micro_batch
        with self.executor.micro_batch(slot):
            with phase("forward"):
                loss = self._loss_function(self.engine(images.to(self._dtype)).float(), labels)
            with phase("backward"):
                self.engine.backward(loss)
        if not is_last:
            with phase("optimizer"):
                self.engine.step()
        return loss.detach()

    @property
    def same_rows(self) -> str | None:
        return self.rules.same_rows(self._model)

    @property
    def bytes_to_come(self) -> float:
        gradient_ranks = int(self.engine.dp_world_size) if self.rules.stage >= 2 else 1
        return bytes_to_come(self._trained, self.engine.basic_optimizer, gradient_ranks)

    def check(self, plan: SkipPlan) -> None:
        check_recompute(self._model)
        slots, replicas = int(self.engine.gradient_accumulation_steps()), int(self.engine.dp_world_size)
        check_plan(plan, slots=slots, replicas=replicas, same_rows=self.same_rows)

    def logits(self, images: Sequence[Tensor]) -> list[Tensor]:
        logits = evaluated(self._model, images)
        if self._twin is not None:
            # ZeRO-3 has fetched ahead for a backward that does not come, and refuses to gather what is under way.
            self.engine.optimizer.empty_partition_cache()
        return logits

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        model, flat = self._model, self.executor.flat
        if self._twin is None:
            with nullcontext() if flat is None else flat.unflattened():
                yield model
            return
        own = dict(model.named_parameters())
        full = copy.deepcopy(self._twin).to_empty(device=next(model.parameters()).device)
        with torch.no_grad():
            for name, parameter in full.named_parameters():
                with whole(own[name]) as data:
                    parameter.data = data.clone()
            for (_, buffer), (_, other) in zip(full.named_buffers(), model.named_buffers(), strict=True):
                buffer.copy_(other)
        yield full.train(model.training)

    def save(self, folder: Path, write: StateWriter) -> None:
        with self._with_flats():
            state = collect(self._model, self.engine)
        if dist.get_rank() == 0:
            state.schedule = schedule_numbers(self.engine.lr_scheduler)
            state.with_parts(self.executor.flat).write(folder, write)

    def restore(self, folder: Path) -> None:
        state = PortableState.read(folder).with_flats(self.executor.flat)
        with self._with_flats():
            restore(state, self._model, self.engine)
        restore_schedule(self.engine.lr_scheduler, state.schedule)

    def _with_flats(self) -> AbstractContextManager[None]:
        """Inside, the model has the parameters that DeepSpeed knows."""
        flat = self.executor.flat
        return nullcontext() if flat is None else flat.shown()


def _groups(model: nn.Module, optimizer: Any, parameters: Any) -> list[dict[str, Any]]:
    """The groups of parameters that DeepSpeed's optimiser will have. parameters: what `deepspeed.initialize` takes as
    `model_parameters`."""
    if isinstance(optimizer, Optimizer):
        return optimizer.param_groups
    given: list[Any] = list(model.parameters() if parameters is None else parameters)
    return given if all(isinstance(each, dict) for each in given) else [{"params": given}]
