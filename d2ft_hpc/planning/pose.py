"""The one place that poses problems: scores, what a model costs and where its subnets lie, as planners solve it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from d2ft_hpc.planning.problem import Ints, PlanProblem


class CostShares(Protocol):
    """What a model costs, as counted, measured or recorded."""

    @property
    def forward_share(self) -> float:
        """Cost of FORWARD_ONLY in units of FULL."""

    @property
    def always_share(self) -> float:
        """Share of the dense step that runs whatever a plan says."""


class SubnetPlacement(Protocol):
    """Which rank of which replica holds which subnet."""

    @property
    def replicas(self) -> int: ...

    @property
    def owner(self) -> Ints:
        """int64 [block, head], the tensor-parallel rank."""

    @property
    def stage(self) -> Ints:
        """int64 [block], the pipeline stage."""


def pose(
    scores: npt.ArrayLike, costs: CostShares, placement: SubnetPlacement | None = None, **options: Any
) -> PlanProblem:
    """The problem of scores [2, row, block, head], forward and backward.

    placement: None: each rank holds the whole model. options: of `PlanProblem.parallel`, which raises; they come before
    what costs and placement say.
    """
    known: dict[str, Any] = {"forward_cost": costs.forward_share, "always_share": costs.always_share}
    if placement is not None:
        known |= {"replicas": placement.replicas, "rank": placement.owner, "stage": placement.stage}
    return PlanProblem.parallel(*np.asarray(scores, dtype=np.float64), **known | options)
