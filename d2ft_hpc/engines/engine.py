"""What every engine offers to the training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.planning import SkipPlan

MicroBatch = tuple[Tensor, Tensor]
"""Images [sample, channel, height, width] and labels [sample], on the model's device."""

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of logits [sample, class] and labels [sample]."""

PHASES = ("forward", "backward", "optimizer")


@dataclass
class StepReport:
    """What one optimiser step did on this rank."""

    loss: float = float("nan")
    """Mean of the losses of this rank's micro-batches."""
    gradient_norm: float = float("nan")
    """Before clipping, over all ranks; NaN where the engine does not compute it."""
    learning_rate: float = float("nan")
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    """By phase. On a GPU until the phase is queued, not until it is done."""

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the seconds spent inside to `phase`."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


class Engine(Protocol):
    """Trains one replica of a model, or this rank's part of it, by the plan in its executor."""

    executor: PlanExecutor

    @property
    def same_rows(self) -> str | None:
        """Why all replicas must follow the same rows of a plan; None where they need not."""
        ...

    def check(self, plan: SkipPlan) -> None:
        """Raises PlanError or ConfigError, with reason and fix, where this engine cannot run `plan` exactly."""
        ...

    def full_model(self) -> AbstractContextManager[VisionTransformer]:
        """The model with its present weights, all on this rank, that no other rank is needed to run.

        The model itself, or a copy where its weights are spread over ranks; made by all ranks together.
        """
        ...

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepReport:
        """Forward and backward of each micro-batch in its slot, then one optimiser step; on all ranks together."""
        ...

    def save(self, folder: Path) -> None:
        """Writes weights, optimiser and schedule below `folder`; on all ranks together."""
        ...

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote; on all ranks together. Raises CheckpointError."""
        ...


def zero_missing_gradients(model: nn.Module) -> None:
    """Gives a zero gradient to each trainable parameter that has none.

    An absent gradient means zero in every engine: a parameter that no FULL subnet touched keeps its moments and
    weight decay going, whatever the engine would do with None.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
