"""At which resolution each step of a run trains: images get more tokens as the run goes on.

What a model learns first it learns from few tokens as well as from many, and the last steps fit it to the resolution at
which it is used (EfficientTrain++, arXiv 2405.08768; FixRes, arXiv 1906.06423). Of all ways to meet a budget, the curve
spreads the steps over the resolutions as evenly as it allows: the shares have the largest entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from scipy.optimize import brentq

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.plan import Grid

_STEEPEST = 500.0
"""Beyond this steepness, all shares except one are practically 0."""


@dataclass(frozen=True)
class TokenCurve:
    """grids: patches of an image, down and across, rising. steps: how many steps have each grid, in this order.
    costs: of a step at each grid, in units of one at the last."""

    grids: tuple[Grid, ...]
    steps: tuple[int, ...]
    costs: tuple[float, ...]

    @property
    def share(self) -> float:
        """Share of the run's dense compute that the curve takes."""
        return float(np.dot(self.steps, self.costs)) / sum(self.steps)

    def grid_at(self, step: int) -> Grid:
        """The grid of a step, counted from 0. Steps beyond the run's end have that of the last one."""
        for grid, end in zip(self.grids, accumulate(self.steps), strict=True):
            if step < end:
                return grid
        return self.grids[-1]

    def __str__(self) -> str:
        parts = [
            f"{down} x {across} patches for {steps}"
            for (down, across), steps in zip(self.grids, self.steps, strict=True)
            if steps
        ]
        return f"{', '.join(parts)} steps"


def token_curve(grids: Sequence[Grid], costs: Sequence[float], budget: float, total_steps: int) -> TokenCurve:
    """The curve that spends as much of the budget as whole steps allow.

    grids: that a step may have, rising. costs: of a step at each, in units of one at the last, rising. budget: share of
    the compute of `total_steps` steps at the last grid.

    Raises PlanError, naming the least feasible budget, if not even the first grid throughout keeps it.
    """
    if budget < costs[0]:
        raise PlanError(
            f"compute budget {budget:g} is below what images of {grids[0][0]} x {grids[0][1]} patches throughout "
            f"take; at least {costs[0]:.3f}, or smaller plan.options.sides"
        )
    of_steps = np.asarray(costs, dtype=np.float64)
    shares = _shares(of_steps, budget)
    counts = np.floor(shares * total_steps + 1e-9).astype(np.int64)
    counts[0] += total_steps - counts.sum()
    # The budget that rounding down has left goes to the most expensive steps that still fit.
    left = budget * total_steps - float(counts @ of_steps)
    for level in range(len(counts) - 1, 0, -1):
        for below in range(level):
            rise = of_steps[level] - of_steps[below]
            if counts[below] and rise <= left + 1e-9:
                counts[below] -= 1
                counts[level] += 1
                left -= rise
    return TokenCurve(tuple(grids), tuple(counts.tolist()), tuple(costs))


def _shares(costs: np.ndarray, budget: float) -> np.ndarray:
    """The shares of the steps, float64 [grid], with the largest entropy among those whose mean cost is the budget."""

    def at(steepness: float) -> np.ndarray:
        exponents = -steepness * costs
        weights = np.exp(exponents - exponents.max())
        shares: np.ndarray = weights / weights.sum()
        return shares

    def excess(steepness: float) -> float:
        return float(at(steepness) @ costs) - budget

    for end in (-_STEEPEST, _STEEPEST):  # the dearest alone, the cheapest alone
        if end * excess(end) >= 0:
            return at(end)
    steepness: float = brentq(excess, -_STEEPEST, _STEEPEST)
    return at(steepness)
