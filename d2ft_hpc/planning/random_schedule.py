"""Random scheduling, the baseline of arXiv 2504.12471: the paper planner's numbers of each operation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d2ft_hpc.planning.bounds import plan_with_bound
from d2ft_hpc.planning.paper import two_levels
from d2ft_hpc.planning.plan import SkipPlan
from d2ft_hpc.planning.problem import PlanProblem


def solve_random(problem: PlanProblem, *, seed: int | Sequence[int], full_share: float = 0.8) -> SkipPlan:
    """The plan of `solve_paper` with random numbers for scores; the same for the same seed (numbers >= 0).

    Objective, bound and gap are those of the real scores: how far random is from what the budgets permit.
    """
    generator = np.random.default_rng(seed)
    full_key, forward_key = generator.random((2, *problem.forward_score.shape))
    operations = two_levels(problem, full_key, forward_key, full_share)
    return plan_with_bound(problem, operations, planner="random", status=f"seed {seed}")
