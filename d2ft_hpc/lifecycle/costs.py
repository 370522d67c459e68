"""What a run's planners reckon with: costs of operations, speeds of ranks, memory, messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from d2ft_hpc.errors import ConfigError
from d2ft_hpc.files.untrusted import RefusedError, first_fault
from d2ft_hpc.metering import StepCosts
from d2ft_hpc.parallel.rank_layout import Placement

PAPER_FORWARD_COST = 0.4
"""Cost of FORWARD_ONLY in units of FULL (arXiv 2504.12471)."""

SAME_SPEED = 0.1
"""Speeds that differ by less than this share count as equal: a measurement's noise must not make plans uneven."""

_Cost = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class PlanCosts:
    """forward_share: cost of FORWARD_ONLY in units of FULL. always_share: of the dense step, what always runs.

    device_speed: relative speed of each rank. source: "flops", "measured" or "paper".
    dense_seconds: of a dense micro-batch, alone on a rank (median of the ranks; 0: not known).
    message_latency, seconds_per_byte: of an all-reduce over all ranks, and of a byte on one rank's link (the slowest
    of the ranks).
    """

    forward_share: _Cost
    always_share: _Cost
    device_speed: list[Annotated[float, Field(gt=0)]]
    source: str
    dense_seconds: _Cost = 0.0
    message_latency: _Cost = 0.0
    seconds_per_byte: _Cost = 0.0
    free_bytes: list[_Cost] | None = None
    """Bytes that each rank's memory had left for activations at the start; None: not measured."""
    most_full: list[_Cost] | None = None
    """The most FULL subnets of a micro-batch that each rank's memory has room for; None: no rank is short."""

    @staticmethod
    def counted(costs: StepCosts, device_speed: Sequence[float] | None, ranks: int) -> PlanCosts:
        """By counted FLOPs. device_speed: None: all ranks are equal. Raises ConfigError if it is not one for each."""
        if device_speed is not None and len(device_speed) != ranks:
            raise ConfigError(
                f"device_speed={list(device_speed)}: {len(device_speed)} speeds for {ranks} ranks; give one for "
                f"every rank, or null"
            )
        speed = [1.0] * ranks if device_speed is None else list(device_speed)
        return PlanCosts(costs.forward_share, costs.always_share, speed, "flops")

    @staticmethod
    def parse(text: bytes) -> PlanCosts:
        """What `keep_costs` wrote. Raises ValueError if it is none."""
        try:
            return _PLAN_COSTS.validate_json(text, strict=True)
        except ValidationError as error:
            raise RefusedError(first_fault(error)) from None


_PLAN_COSTS = TypeAdapter(PlanCosts)


def relative_speeds(seconds: Sequence[float]) -> list[float]:
    """Speeds with mean 1 from the seconds that every rank takes for the same work; small differences do not count."""
    speed = 1 / np.asarray(seconds, dtype=np.float64)
    order = np.argsort(speed, kind="stable")
    starts = np.flatnonzero(np.diff(speed[order], prepend=-np.inf) > SAME_SPEED * speed[order])
    for group in np.split(order, starts[1:]):
        speed[group] = speed[group].mean()
    return [float(value) for value in speed / speed.mean()]


def costs_of_part(costs: StepCosts, layer_flops: Sequence[float], placement: Placement) -> StepCosts:
    """Costs of a rank's part of the dense model; what always runs does so on every tensor-parallel rank.

    layer_flops: of what lies below the blocks, of each block, and of what lies above.
    """
    layout = placement.layout
    below = layer_flops[0] if layout.stage == 0 else 0.0
    above = layer_flops[-1] if layout.stage == layout.stages - 1 else 0.0

    def own(of_size: StepCosts) -> StepCosts:
        # Outside the blocks are only the patches and a small classifier: their share is taken to be the same at every
        # resolution.
        outside = (below + above) * of_size.outside_flops / costs.outside_flops
        return replace(of_size, outside_flops=outside, subnets=placement.own.sum(axis=1))

    return replace(own(costs), at={grid: own(of_size) for grid, of_size in costs.at.items()})
