"""The predicted time of a step with its tensor-parallel messages, and the layout of tokens in which it is shorter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2ft_hpc.planning.arrays import Floats, Ints
from d2ft_hpc.planning.communication_volume import (
    ByDirection,
    TokenLayout,
    active_and_full_ranks,
    tensor_parallel_seconds,
)
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
        active, full = active_and_full_ranks(plan.operations, problem.rank, problem.ranks)
        between_stages = self._between_stages(plan, problem, layout)

        def with_messages(forward_work: Floats, backward_work: Floats) -> ByDirection:
            forward, backward = (
                _with_messages(work, sent / self.seconds_per_cost, senders, layout)
                for work, sent, senders in (
                    (forward_work, messages.forward, active),
                    (backward_work, messages.backward, full),
                )
            )
            return ByDirection(
                forward + between_stages.forward / self.seconds_per_cost,
                backward + between_stages.backward / self.seconds_per_cost,
            )

        return self.seconds_per_cost * simulate(plan, problem, with_messages).step

    def _between_stages(self, plan: SkipPlan, problem: PlanProblem, layout: TokenLayout) -> ByDirection:
        """Seconds that the stage of each block sends after it, float64 [row, block]."""
        share = 1.0 if layout == "replicated" else 1 / problem.ranks
        at_boundary = share * self.activation_bytes * self.seconds_per_byte
        forward, backward = np.zeros((2, *plan.operations.shape[:2]))
        for stage in range(1, problem.stages):
            first = int(np.flatnonzero(problem.stage == stage)[0])
            trained_below = (plan.operations[:, :first] == Operation.FULL).any(axis=(1, 2))
            forward[:, first - 1] = at_boundary
            backward[:, first] = at_boundary * trained_below
        return ByDirection(forward, backward)

    def fastest(
        self, plan: SkipPlan, problem: PlanProblem, layouts: Sequence[TokenLayout]
    ) -> tuple[float, TokenLayout]:
        """The plan's seconds in its fastest layout (the first of equally fast ones), and that layout."""
        return min(((self.of(plan, problem, layout), layout) for layout in layouts), key=lambda pair: pair[0])


def _with_messages(work: Floats, sent: Floats, senders: Ints, layout: TokenLayout) -> Floats:
    """Time of work and messages, which follow one another except in the overlapped layout. senders: ranks, int64
    [row, block].

    Overlapped, a half's work goes on while the other half's tokens come, or its sums leave; and where one rank sends,
    these use a link's two directions at once.
    """
    if layout != "overlapped":
        return work + sent
    return work + sent - np.minimum(np.where(senders == 1, sent / 4 + work / 2, work), sent / 2)
