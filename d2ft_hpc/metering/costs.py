"""The compute that a plan promises, from counted passes of the model itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.metering.meter import meter
from d2ft_hpc.model.probe import probe
from d2ft_hpc.planning.plan import Operation, SkipPlan


@dataclass(frozen=True)
class StepCosts:
    """FLOPs of one sample: of what always runs, of one subnet under FULL and under FORWARD_ONLY, and of scoring it."""

    always_flops: float
    full_flops: float
    forward_only_flops: float
    num_subnets: int
    score_flops: float = 0.0
    """0 where samples are not scored one by one."""

    @property
    def forward_share(self) -> float:
        """Cost of FORWARD_ONLY in units of FULL (c_f of the paper)."""
        return self.forward_only_flops / self.full_flops

    @property
    def dense_flops(self) -> float:
        """Training FLOPs of one sample in the dense model."""
        return self.always_flops + self.num_subnets * self.full_flops

    @property
    def always_share(self) -> float:
        """Share of the dense FLOPs that runs whatever the plan says."""
        return self.always_flops / self.dense_flops

    def planned_flops(self, rows: np.ndarray) -> np.ndarray:
        """Training FLOPs of one sample under each row; rows: uint8 [row, block, head], returns float64 [row]."""
        full = (rows == Operation.FULL).sum(axis=(1, 2))
        forward_only = (rows == Operation.FORWARD_ONLY).sum(axis=(1, 2))
        flops: np.ndarray = (
            self.always_flops + full * self.full_flops + forward_only * self.forward_only_flops
        )
        return flops

    def planned_share(self, plan: SkipPlan) -> float:
        """The plan's training FLOPs over the dense ones, always-run parts and scoring included."""
        if plan.binding == "sample":
            return plan.shares()[Operation.FULL] + self.score_flops / self.dense_flops
        return float(self.planned_flops(plan.operations).mean() / self.dense_flops)


def measure_costs(
    model: VisionTransformer, executor: PlanExecutor, image_shape: tuple[int, int, int]
) -> StepCosts:
    """Counts training passes of one blank image with all subnets SHORTCUT, FORWARD_ONLY and FULL.

    image_shape: (channel, height, width). Model, gradients, random state and the loaded plan stay as they were.
    """
    flops = {operation: _count_flops(model, executor, operation, image_shape) for operation in Operation}
    subnets = executor.subnets.num_blocks * executor.subnets.num_heads
    always = flops[Operation.SHORTCUT]
    return StepCosts(
        always_flops=always,
        full_flops=(flops[Operation.FULL] - always) / subnets,
        forward_only_flops=(flops[Operation.FORWARD_ONLY] - always) / subnets,
        num_subnets=subnets,
    )


def _count_flops(
    model: VisionTransformer, executor: PlanExecutor, operation: Operation, image_shape: tuple[int, int, int]
) -> int:
    operations = np.full(executor.subnets.shape, operation, dtype=np.uint8)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    image = torch.zeros(1, *image_shape, device=trained[0].device, dtype=trained[0].dtype)
    with probe(model, training=True), executor.temporarily(operations), meter() as metered:
        torch.autograd.grad(model(image).sum(), trained, allow_unused=True)
    return metered.flops
