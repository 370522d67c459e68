"""What every engine offers to the training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MicroBatch = tuple[Tensor, Tensor]
"""Images [sample, channel, height, width] and labels [sample], on the model's device."""

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of logits [sample, class] and labels [sample]."""

StateWriter = Callable[[Any, Path], None]
"""Takes a file's content (nested dicts and lists of tensors and numbers) and the file that `torch.load` shall read."""

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
    """Trains one replica of a model by the plan in its executor."""

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepReport:
        """Forward and backward of each micro-batch in its slot, then one optimiser step; on all ranks together."""
        ...

    def save(self, folder: Path, write: StateWriter) -> None:
        """Hands weights, optimiser and schedule to `write`, for files below `folder`; on all ranks together."""
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
