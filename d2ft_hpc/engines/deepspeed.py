"""DeepSpeed's data parallelism, ZeRO stages 0 and 1.

Replicas may follow different rows: a parameter that a replica's micro-batches did not touch gets a zero gradient
before the reduction, so that all replicas reduce the same tensors. ZeRO 2 and 3 reduce during backward, where a
skipped block would stall or corrupt the reduction, and are refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2ft_hpc.engines.engine import LossFunction, MicroBatch, StateWriter, StepReport, zero_missing_gradients
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.executor import PlanExecutor

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
    zero = {"stage": 1 if precision == "fp16" else 0, **settings.get("zero_optimization", {})}
    stage = zero["stage"]
    if precision == "fp16" and stage == 0:
        raise ConfigError(
            "engine.deepspeed.zero_optimization.stage=0 with engine.precision=fp16: DeepSpeed's fp16 optimiser divides "
            "by the loss scale, with which its engine multiplies the loss under ZeRO only. Use stage 1, or bf16"
        )
    if stage not in (0, 1):
        raise ConfigError(
            f"engine.deepspeed.zero_optimization.stage={stage}: a plan that skips blocks is exact under stages 0 and 1 "
            f"only; stages 2 and 3 reduce gradients while backward still runs. Use stage 0 or 1"
        )
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": slots,
        # DeepSpeed clips at 1.0 unless told otherwise.
        "gradient_clipping": gradient_clipping or 0.0,
    }
    if precision != "fp32":
        ours[precision] = {"enabled": True}
    quiet = {"zero_allow_untested_optimizer": True, "steps_per_print": 10**9}
    return {**quiet, **settings, "zero_optimization": zero, **ours}


class DeepSpeedEngine:
    """Trains through a `deepspeed.initialize` engine. torch.distributed must be initialised."""

    def __init__(
        self,
        model: nn.Module,
        executor: PlanExecutor,
        optimizer: Optimizer,
        schedule: LRScheduler,
        loss_function: LossFunction,
        config: Mapping[str, Any],
    ) -> None:
        deepspeed = _import_deepspeed()
        deepspeed.init_distributed(auto_mpi_discovery=False)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=dict(config),
        )
        self._model, self.executor, self._loss_function = model, executor, loss_function
        self._dtype = next(model.parameters()).dtype

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepReport:
        report = StepReport(learning_rate=self.engine.get_lr()[0])
        losses = []
        self.engine.train()
        for slot, (images, labels) in enumerate(micro_batches):
            with self.executor.micro_batch(slot):
                with report.timed("forward"):
                    loss = self._loss_function(self.engine(images.to(self._dtype)).float(), labels)
                if slot == len(micro_batches) - 1:
                    zero_missing_gradients(self._model)
                with report.timed("backward"):
                    self.engine.backward(loss)
            with report.timed("optimizer"):
                self.engine.step()
            losses.append(loss.detach())
        norm = self.engine.get_global_grad_norm()
        report.gradient_norm = float("nan") if norm is None else norm
        report.loss = torch.stack(losses).mean()
        return report

    def save(self, folder: Path, write: StateWriter) -> None:
        own = self.engine.checkpoint_engine
        self.engine.checkpoint_engine = _Writing(own, write)
        try:
            self.engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
        finally:
            self.engine.checkpoint_engine = own

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder), tag="deepspeed")


class _Writing:
    """DeepSpeed's checkpoint engine, but for who writes the files."""

    def __init__(self, checkpoint_engine: Any, write: StateWriter) -> None:
        self._checkpoint_engine, self._write = checkpoint_engine, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint_engine, name)

    def save(self, state_dict: Any, path: str) -> None:
        self._write(state_dict, Path(path))


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without the minute that its first use on a CPU would spend on compiling an all-reduce."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops

    if "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
