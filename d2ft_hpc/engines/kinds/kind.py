"""What an engine can and cannot run, and how it is built: one class for each engine, so that no other code compares
engines' names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from d2ft_hpc.planning.communication_volume import DataParallel

if TYPE_CHECKING:  # a configuration is checked by these classes
    from collections.abc import Callable

    import torch
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from d2ft_hpc.config import EngineConfig, RunConfig
    from d2ft_hpc.engines.engine import Engine, LossFunction
    from d2ft_hpc.execution.executor import PlanExecutor
    from d2ft_hpc.launch import Control
    from d2ft_hpc.parallel.rank_layout import Placement


@dataclass(frozen=True)
class Request:
    """What an engine is built from. make_optimizer: optimiser and schedule of a model, or of this rank's part of it."""

    config: RunConfig
    model: Any
    executor: PlanExecutor
    placement: Placement
    make_optimizer: Callable[[Any], tuple[Optimizer, LRScheduler]]
    loss_function: LossFunction
    control: Control

    @property
    def low_dtype(self) -> torch.dtype | None:
        """The type in which forward and backward run, if it is not that of the weights."""
        import torch

        return torch.bfloat16 if self.config.engine.precision == "bf16" else None


class EngineKind:
    """The defaults are those of an engine in which each rank has the whole model and nothing is special."""

    name: str
    about: str
    """For users, who choose by it."""
    libraries: tuple[str, ...] = ("torch",)
    """Libraries whose undocumented names it uses."""
    is_one_process = False
    """It cannot be started on several ranks."""
    scales_losses = False
    """As fp16 needs."""
    reads_deepspeed = False
    """The settings in `engine.deepspeed`."""
    has_pipeline = False
    cuts_heads = False
    """Tensor parallelism."""
    why_no_samples: str | None = None
    """Why planner `samples` cannot be used; None where it can."""
    scores_with_own_model = True
    """True: samples are scored by the engine's model; False: by the model that it was given, which it trains in
    place."""
    graphs_micro_batches = False
    """Whether `engine.cuda_graphs` makes graphs of whole micro-batches; other engines get graphs of blocks."""

    def check(self, config: RunConfig) -> None:
        """Raises ValueError, with key and fix, where this engine cannot run what is asked."""
        engine, plan = config.engine, config.plan
        if engine.precision == "fp16" and not self.scales_losses:
            raise ValueError(
                f"engine.precision=fp16: engine {self.name} does not scale losses; use bf16, or deepspeed"
            )
        if engine.deepspeed and not self.reads_deepspeed:
            raise ValueError(
                f"engine.deepspeed: engine {self.name} does not read it; remove it, or engine.name=deepspeed"
            )
        if plan.entry.binding == "sample" and self.why_no_samples is not None:
            raise ValueError(
                f"plan.planner={plan.planner} with engine.name={self.name}: {self.why_no_samples}"
            )
        if engine.is_cut:
            self._check_parts(config)

    def _check_parts(self, config: RunConfig) -> None:
        """The same where each rank holds a part of the model."""
        engine, plan, parts = config.engine, config.plan, config.engine.parts
        if not self.has_pipeline and not self.cuts_heads:
            raise ValueError(f"{parts}: with engine {self.name} a rank has the whole model; use deepspeed")
        if engine.pipeline_stages > 1 and not self.has_pipeline:
            raise ValueError(f"{parts}: engine {self.name} has no pipeline; use deepspeed")
        if engine.cuda_graphs:
            raise ValueError(
                "engine.cuda_graphs=true: cannot be used where ranks hold parts of the model; remove it, or use data "
                "parallelism"
            )
        if engine.precision == "fp16":
            raise ValueError(
                f"engine.precision=fp16 with {parts}: loss scaling was never tested there; use bf16"
            )
        scales = plan.entry.binding == "sample" or plan.token_share is not None
        if engine.token_layout in ("sharded", "overlapped") and scales:
            by = "" if plan.token_budget is None else f", plan.token_budget={plan.token_budget:g}"
            raise ValueError(
                f"engine.token_layout={engine.token_layout} with plan.planner={plan.planner}{by}: images have another "
                f"resolution then, with fewer tokens; use replicated"
            )

    def prepare(self, config: RunConfig) -> None:
        """Raises ConfigError where libraries refuse what is asked; before any work is spent."""

    def data_parallel(self, engine: EngineConfig) -> DataParallel:
        """How replicas reduce, which decides what they send."""
        return "ddp"

    def build(self, asked: Request) -> Engine:
        """On all ranks together. Raises ConfigError where the engine cannot run what is asked."""
        raise NotImplementedError
