"""How long a micro-batch takes alone when all subnets are FULL, FORWARD_ONLY, or SHORTCUT."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.metering.flops import StepCosts
from d2ft_hpc.model.probe import probe
from d2ft_hpc.planning.plan import Operation

_REPEATS = 2


@dataclass(frozen=True)
class PassProfile:
    """Seconds of one micro-batch's forward and backward, alone on this rank; NaN if it did not fit."""

    dense_seconds: float
    always_seconds: float
    forward_only_seconds: float

    @property
    def forward_share(self) -> float:
        """Time of FORWARD_ONLY subnets in units of FULL ones, in [0, 1]."""
        of_subnets = max(self.dense_seconds - self.always_seconds, 1e-12)
        return float(np.clip((self.forward_only_seconds - self.always_seconds) / of_subnets, 0.0, 1.0))

    @property
    def always_share(self) -> float:
        """Share of the dense time that passes whatever the plan says, in [0, 1)."""
        return min(self.always_seconds / self.dense_seconds, 0.99)

    def ideal_seconds(self, flops_share: float, costs: StepCosts, share_of_tokens: float = 1.0) -> float:
        """Seconds of a micro-batch that computes this share of the dense FLOPs, always-run parts included.

        share_of_tokens: what its images take of the dense FLOPs if no head is skipped; below 1 for small ones.
        """
        always = costs.always_share
        share = (flops_share / share_of_tokens - always) / (1 - always)
        return share_of_tokens * (self.always_seconds + share * (self.dense_seconds - self.always_seconds))


def profile_passes(
    model: nn.Module,
    executor: PlanExecutor,
    images_shape: tuple[int, int, int, int],
    precision: torch.dtype,
) -> PassProfile:
    """Times passes over a blank micro-batch.

    images_shape: (sample, channel, height, width). Model, gradients, random state and the plan in force stay as they
    were.
    """
    try:
        return PassProfile(
            *(
                fastest_pass(model, executor, operation, images_shape, precision)
                for operation in (Operation.FULL, Operation.SHORTCUT, Operation.FORWARD_ONLY)
            )
        )
    except torch.OutOfMemoryError:
        return PassProfile(float("nan"), float("nan"), float("nan"))


def fastest_pass(
    model: nn.Module,
    executor: PlanExecutor,
    operation: Operation,
    images_shape: tuple[int, int, int, int],
    precision: torch.dtype,
) -> float:
    """Seconds of the fastest of some passes after a first one, all subnets under this operation."""
    operations = executor.uniform(operation)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = trained[0].device
    images = torch.zeros(images_shape, device=device, dtype=trained[0].dtype)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32, cache_enabled=False)
    seconds = []
    with probe(model, training=True), executor.temporarily(operations):
        for _ in range(1 + _REPEATS):
            start = time.perf_counter()
            with autocast:
                output = model(images).float().sum()
            torch.autograd.grad(output, trained, allow_unused=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
