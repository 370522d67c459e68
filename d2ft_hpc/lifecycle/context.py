"""What the plans of a run depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2ft_hpc.lifecycle.costs import PlanCosts
from d2ft_hpc.metering import StepCosts
from d2ft_hpc.parallel.rank_layout import Placement
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.planning.arrays import Ints
from d2ft_hpc.planning.communication_volume import TokenLayout
from d2ft_hpc.planning.step_time import StepTime
from d2ft_hpc.planning.token_curve import TokenCurve

DIFFERENT_REPLICAS = 8
"""Replicas that get rows of their own, of all whose ranks have the same speed and memory. Any samples fill a slot, so
that the scores of more replicas differ by chance alone: one problem, solved once, is as good for all that share it."""


@dataclass(frozen=True, eq=False)
class PlanContext:
    """The same on all ranks, except the number of this rank.

    settings: how to plan. placement: which rank holds which subnet. costs: counted FLOPs of the whole model.
    reckoned: what planners take for costs, speeds and memory. slots: micro-batches of a replica's batch.
    micro_batch_size: samples of one. seed: of planners that draw.
    replicas_meet: replicas wait for each other in every block, as under ZeRO 3 and FSDP2, which gather its weights.
    same_rows: all replicas follow the same rows.
    activation_bytes: of a micro-batch between blocks. token_layouts: of the tokens, those that a plan may have.
    total_steps: of the run; None where nobody knows.
    curve: the resolution of each step's images; None: they have full size.
    where: what stands before the settings' keys in messages, as users write them.
    """

    settings: PlanConfig
    placement: Placement
    costs: StepCosts
    reckoned: PlanCosts
    slots: int
    micro_batch_size: int
    seed: int = 0
    replicas_meet: bool = False
    same_rows: bool = False
    activation_bytes: float = 0.0
    token_layouts: Sequence[TokenLayout] = ("replicated",)
    total_steps: int | None = None
    curve: TokenCurve | None = None
    where: str = "plan."

    @property
    def replicas(self) -> int:
        return self.placement.layout.replicas

    @property
    def followed(self) -> Ints:
        """int64 [replica]: whose rows each replica follows; those that are planned follow their own."""
        if self.same_rows:
            return np.zeros(self.replicas, dtype=np.int64)
        known = [
            values for values in (self.reckoned.device_speed, self.reckoned.most_full) if values is not None
        ]
        of_replicas = [np.reshape(self.by_device(values), (self.replicas, -1)) for values in known]
        kind = np.unique(np.concatenate(of_replicas, axis=1), axis=0, return_inverse=True)[1].ravel()
        order = np.argsort(kind, kind="stable")
        first = np.searchsorted(kind[order], kind[order])  # of its kind, a place in the order
        place = np.arange(self.replicas) - first
        followed = np.empty_like(order)
        followed[order] = order[first + place % DIFFERENT_REPLICAS]
        return followed

    @property
    def subnets(self) -> tuple[int, int]:
        """Blocks, heads."""
        blocks, heads = self.placement.owner.shape
        return blocks, heads

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, blocks, heads."""
        return (self.slots * self.replicas, *self.subnets)

    @property
    def compute_budget(self) -> float:
        """A plan's share of a step's dense compute, at the resolution that it has."""
        tokens = 1.0 if self.curve is None else self.curve.share
        return min(self.settings.compute_budget / tokens, 1.0)

    def scaled(self, plan: SkipPlan, step: int) -> SkipPlan:
        """The plan as it is at `step`: with the grid that the curve has there."""
        return plan if self.curve is None else plan.at(self.curve.grid_at(step))

    def share_of_run(self, plan: SkipPlan) -> float:
        """Of the dense compute, what all steps take under these operations, if they have equally many samples."""
        if self.curve is None:
            return self.costs.planned_share(plan)
        shares = [self.costs.planned_share(plan.at(grid)) for grid in self.curve.grids]
        return float(np.average(shares, weights=self.curve.steps))

    def by_device(self, of_ranks: Sequence[float]) -> list[float]:
        """The ranks' values in the order of a problem's devices: replica, stage, tensor-parallel rank."""
        layout = self.placement.layout
        return [
            of_ranks[layout.rank_of(stage=stage, replica=replica, tensor_rank=tensor_rank)]
            for replica in range(layout.replicas)
            for stage in range(layout.stages)
            for tensor_rank in range(layout.tensor_ranks)
        ]

    @property
    def step_time(self) -> StepTime:
        """The model of how long a step's subnets and messages take, from what all ranks measured."""
        of_subnets = self.reckoned.dense_seconds * (1 - self.reckoned.always_share)
        return StepTime(
            seconds_per_cost=max(of_subnets / self.costs.num_subnets, 1e-12),
            activation_bytes=self.activation_bytes,
            seconds_per_byte=self.reckoned.seconds_per_byte,
            latency=self.reckoned.message_latency,
        )
