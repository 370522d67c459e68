"""What every engine offers to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from d2ft_hpc.errors import PlanError
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.families.table import backbone_of, family_of
from d2ft_hpc.model.probe import evaluating
from d2ft_hpc.planning import SkipPlan

MicroBatch = tuple[Tensor, Tensor]
"""Images [sample, channel, height, width] and labels [sample], on the model's device."""

Inputs = Tensor | Mapping[str, Tensor]
"""What a model takes of some samples: images [sample, channel, height, width], or tensors by name."""

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of logits [sample, class] and labels [sample]."""

StateWriter = Callable[[Any, Path], None]
"""Takes the content of a safetensors file, {"tensors": by name, "metadata": texts by name}, and the file."""


@dataclass
class StepReport:
    """What one optimiser step did on this rank."""

    loss: float | Tensor = float("nan")
    """Mean of the losses of this rank's micro-batches; a tensor, because reading it would wait for the GPU."""
    gradient_norm: float | Tensor = float("nan")
    """Before clipping, over all ranks; NaN where the engine does not compute it."""
    learning_rate: float = float("nan")
    skipped: bool = False
    """Whether a gradient overflowed in fp16, so that the loss scaler left the step out."""


class Engine(Protocol):
    """Trains one replica of a model, or this rank's part of it, by the plan in its executor."""

    executor: PlanExecutor

    @property
    def same_rows(self) -> str | None:
        """Why all replicas must follow the same rows of a plan; None where they need not."""
        ...

    @property
    def bytes_to_come(self) -> float:
        """Bytes of gradients and optimiser state that the first step makes on this rank's device (`state_bytes`)."""
        ...

    def check(self, plan: SkipPlan) -> None:
        """Raises PlanError or ConfigError, with reason and fix, where this engine cannot run `plan` exactly."""
        ...

    def full_model(self) -> AbstractContextManager[nn.Module]:
        """The model with its present weights, complete on this rank, so that it runs without other ranks. It is the
        model itself, or a copy where weights are spread over ranks. All ranks call it together.
        """
        ...

    def logits(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Logits [sample, class] of each micro-batch's images, of any size, in evaluation mode; the same on all ranks
        of a replica. All ranks call it together."""
        ...

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepReport:
        """Forward and backward of each micro-batch in its slot, then one optimiser step; all ranks call it
        together."""
        ...

    def save(self, folder: Path, write: StateWriter) -> None:
        """Hands weights, optimiser and schedule to `write`, for files below `folder`; all ranks call it together."""
        ...

    def restore(self, folder: Path) -> None:
        """Restores what `save` wrote; all ranks call it together. Raises CheckpointError."""
        ...


def evaluated(model: nn.Module, micro_batches: Sequence[Inputs]) -> list[Tensor]:
    """`Engine.logits` of a model that this rank can run; of text, they are [sample, token, word]. By the model itself:
    a copy would lack what libraries have changed of its forward."""
    backbone = backbone_of(model)
    dtype = next(backbone.parameters()).dtype
    with family_of(backbone).taking_any_size(backbone), evaluating(model):
        return [logits_of(model, each, dtype) for each in micro_batches]


def logits_of(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None = None) -> Tensor:
    """What the model computes, which transformers' models wrap. dtype: that images get; None: they keep theirs.

    Raises PlanError where it computes no logits.
    """
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs.to(dtype))
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise PlanError(
            f"{type(model).__name__} gives no logits, by which samples are scored: give it with its head, or "
            f"use another planner than samples"
        )
    return logits


def set_training(modules: Sequence[nn.Module]) -> None:
    """Training mode for a model's modules, the outermost first. Setting it takes a millisecond or two in each step,
    so it is only set if some module is in another mode."""
    if not all(module.training for module in modules):
        modules[0].train()


def zero_missing_gradients(trained: Iterable[nn.Parameter]) -> None:
    """Gives a zero gradient to each of the trainable parameters that has none.

    An absent gradient means zero in every engine: a parameter that no FULL subnet touched keeps updating its moments
    and decaying its weight, whatever the engine would do with None.
    """
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
