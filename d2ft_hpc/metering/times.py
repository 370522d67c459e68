"""What a model's parts really take on this rank: seconds of training passes and of all-reduces."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.model.probe import probe
from d2ft_hpc.planning.plan import Operation

_REPEATS = 5
_SMALL_NUMBERS, _LARGE_NUMBERS = 16, 1 << 20  # float32 numbers of the two all-reduces


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of one micro-batch's forward and backward: medians of some repeats.

    always: with every subnet SHORTCUT. forward_only, full: with every subnet so.
    """

    always: float
    forward_only: float
    full: float

    @property
    def forward_share(self) -> float:
        """Time of FORWARD_ONLY subnets in units of FULL ones, in [0, 1]."""
        of_subnets = max(self.full - self.always, 1e-12)
        return float(np.clip((self.forward_only - self.always) / of_subnets, 0.0, 1.0))

    @property
    def always_share(self) -> float:
        """Share of the dense time that passes whatever the plan says, in [0, 1)."""
        return min(self.always / self.full, 0.99)


def measure_passes(
    model: VisionTransformer, executor: PlanExecutor, images_shape: tuple[int, int, int, int]
) -> PassSeconds:
    """Times training passes of blank images (sample, channel, height, width) after one that warms up.

    Model, gradients, random state and the loaded plan stay as they were.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    images = torch.zeros(images_shape, device=trained[0].device, dtype=trained[0].dtype)

    def once() -> None:
        torch.autograd.grad(model(images).sum(), trained, allow_unused=True)

    seconds = {}
    for operation in Operation:
        operations = np.full(executor.subnets.shape, operation, dtype=np.uint8)
        with probe(model, training=True), executor.temporarily(operations):
            seconds[operation] = _median_seconds(once, images.device)
    always, forward_only, full = (seconds[operation] for operation in Operation)
    return PassSeconds(always, max(forward_only, always), max(full, forward_only, always))


@dataclass(frozen=True)
class AllReduceSeconds:
    """latency: of an all-reduce of almost nothing. per_byte: what every further byte takes."""

    latency: float
    per_byte: float


def measure_all_reduce(device: torch.device) -> AllReduceSeconds:
    """Times all-reduces over all ranks; on all of them together. Zeros where torch.distributed is not in use."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return AllReduceSeconds(0.0, 0.0)

    def seconds_of(numbers: int) -> float:
        buffer = torch.zeros(numbers, device=device)
        return _median_seconds(lambda: torch.distributed.all_reduce(buffer), device)

    small, large = seconds_of(_SMALL_NUMBERS), seconds_of(_LARGE_NUMBERS)
    return AllReduceSeconds(small, max(large - small, 0.0) / (4 * (_LARGE_NUMBERS - _SMALL_NUMBERS)))


def _median_seconds(once: Callable[[], object], device: torch.device) -> float:
    once()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))
