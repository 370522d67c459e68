"""The predicted time of a step with its tensor-parallel messages, and the layout of tokens in which it is shorter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2ft_hpc.planning.messages import ByDirection, TokenLayout, tensor_parallel_seconds
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.problem import PlanProblem
from d2ft_hpc.planning.simulate import simulate


@dataclass(frozen=True)
class StepTime:
    """seconds_per_cost: of a unit of the problem's compute costs on a device of speed 1.

    activation_bytes: of a micro-batch between blocks. seconds_per_byte: on a rank's link. latency: of a branch's
    messages in one direction, seconds.
    """

    seconds_per_cost: float
    activation_bytes: float
    seconds_per_byte: float
    latency: float

    def of(self, plan: SkipPlan, problem: PlanProblem, layout: TokenLayout) -> float:
        """Seconds of what the plan decides: subnets, and the messages between tensor-parallel ranks and stages."""
        messages = tensor_parallel_seconds(
            plan.operations,
            problem.rank,
            problem.ranks,
            self.activation_bytes,
            layout,
            seconds_per_byte=self.seconds_per_byte,
            latency=self.latency,
        )
        forward, backward = messages.forward, messages.backward
        share = 1 / problem.ranks if layout == "sharded" else 1.0
        at_boundary = share * self.activation_bytes * self.seconds_per_byte
        for stage in range(1, problem.stages):
            first = int(np.flatnonzero(problem.stage == stage)[0])
            trained_below = (plan.operations[:, :first] == Operation.FULL).any(axis=(1, 2))
            forward[:, first - 1] += at_boundary
            backward[:, first] += at_boundary * trained_below
        in_costs = ByDirection(forward / self.seconds_per_cost, backward / self.seconds_per_cost)
        return self.seconds_per_cost * simulate(plan, problem, in_costs).step

    def fastest(
        self, plan: SkipPlan, problem: PlanProblem, layouts: Sequence[TokenLayout]
    ) -> tuple[float, TokenLayout]:
        """The plan's seconds in the layout in which it is fastest, the first of equal ones; and that layout."""
        return min(((self.of(plan, problem, layout), layout) for layout in layouts), key=lambda pair: pair[0])
