"""Problems from flat options, which tests draw, combine and leave out."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from d2ft_hpc.planning import Budgets, Devices, GivenShares, PlanProblem, pose
from d2ft_hpc.planning.communication_volume import TokenLayout


def pose_flat(
    forward_score: npt.ArrayLike,
    backward_score: npt.ArrayLike,
    *,
    compute_budget: float,
    communication_budget: float | None = None,
    memory_budget: float | None = None,
    forward_cost: float = 1 / 3,
    always_share: float = 0.0,
    device_speed: Any = None,
    messages: TokenLayout | None = None,
    **devices: Any,
) -> PlanProblem:
    """devices: other fields of `Devices`."""
    return pose(
        [forward_score, backward_score],
        GivenShares(forward_cost, always_share),
        Budgets(compute_budget, communication_budget, memory_budget),
        Devices(speed=device_speed, **devices),
        messages,
    )
