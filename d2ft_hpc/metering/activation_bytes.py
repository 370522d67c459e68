"""How much memory a micro-batch keeps for its backward, depending on what runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.metering.memory import kept_bytes
from d2ft_hpc.model.probe import probe
from d2ft_hpc.planning.plan import Operation


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes that one micro-batch keeps for its backward in the whole model, without the weights.

    unowned: for frozen blocks, and for the parts that no head owns if every block has FULL heads. by_full: for each
    FULL subnet of the other blocks. Both are NaN where not even one sample fits.
    """

    unowned: float
    by_full: float

    def of(self, full: int) -> float:
        """With this many FULL subnets."""
        return self.unowned + full * self.by_full


def measure_activation_bytes(
    model: nn.Module,
    executor: PlanExecutor,
    images_shape: tuple[int, int, int, int],
    precision: torch.dtype,
) -> ActivationBytes:
    """Counts what a forward of a blank micro-batch keeps with all heads FULL, and with one in each block.

    images_shape: (sample, channel, height, width); where memory is too short, fewer samples are taken and the count
    is scaled up. Model, gradients, random state and the plan in force stay as they were.
    """
    samples, heads = images_shape[0], executor.subnets.num_heads
    blocks = int(executor.trains.sum())
    few = min(1, heads - 1)  # of a single head, none
    while True:
        try:
            dense, sparse = (
                images_shape[0]
                / samples
                * _of_plan(model, executor, full, (samples, *images_shape[1:]), precision)
                for full in (heads, few)
            )
        except torch.OutOfMemoryError:
            if samples == 1:
                return ActivationBytes(float("nan"), float("nan"))
            samples = -(-samples // 2)
        else:
            by_full = (dense - sparse) / max(blocks * (heads - few), 1)
            return ActivationBytes(sparse - blocks * few * by_full, by_full)


def _of_plan(
    model: nn.Module,
    executor: PlanExecutor,
    full: int,
    images_shape: tuple[int, ...],
    precision: torch.dtype,
) -> int:
    """full: heads that are FULL in each block; the others are FORWARD_ONLY."""
    operations = executor.uniform(Operation.FORWARD_ONLY)
    operations[:, :full] = Operation.FULL
    weight = next(model.parameters())
    images = torch.zeros(images_shape, device=weight.device, dtype=weight.dtype)
    autocast = torch.autocast(
        weight.device.type, precision, enabled=precision != torch.float32, cache_enabled=False
    )
    with probe(model, training=True), executor.temporarily(operations), autocast:
        return kept_bytes(
            lambda: model(images).float().sum(), (*model.parameters(), *model.buffers(), images)
        )
