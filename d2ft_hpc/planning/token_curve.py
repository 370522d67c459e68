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
from d2ft_hpc.planning.arrays import Floats, Ints
from d2ft_hpc.planning.plan import Grid, image_size

_STEEPEST = 500.0
"""Beyond this steepness, all shares except one are practically 0."""


@dataclass(frozen=True)
class TokenCurve:
    """grids: patches of an image, down and across, rising. steps: how many steps have each grid, in this order.
    share: the share of the run's dense compute that the curve takes."""

    grids: tuple[Grid, ...]
    steps: tuple[int, ...]
    share: float

    def grid_at(self, step: int) -> Grid:
        """The grid of a step, counted from 0. Steps beyond the run's end have that of the last one."""
        for grid, end in zip(self.grids, accumulate(self.steps), strict=True):
            if step < end:
                return grid
        return self.grids[-1]

    def in_words(self, patch_size: Grid | None) -> str:
        """patch_size: pixels of a patch, down and across; None: not known here."""
        taken = [(grid, steps) for grid, steps in zip(self.grids, self.steps, strict=True) if steps]
        parts = [f"{image_size(grid, patch_size)} for {steps}" for grid, steps in taken]
        never = "" if self.steps[-1] else f", {image_size(self.grids[-1], patch_size)} for none"
        return f"{', '.join(parts)} step{'s' * (taken[-1][1] > 1)}{never}"


def token_curve(
    grids: Sequence[Grid], costs: Sequence[float], budget: float, samples: Sequence[int]
) -> TokenCurve:
    """The curve that spends as much of the budget as whole steps allow.

    grids: that a step may have, rising. costs: of a sample at each, in units of one at the last, rising. budget: share
    of the compute of all samples at the last grid. samples: of each step, such as fewer at the end of each epoch; any
    number where they are all the same.

    Raises PlanError, naming the least feasible budget, if not even the first grid throughout keeps it.
    """
    if budget < costs[0]:
        raise PlanError(
            f"compute budget {budget:g} is below what images of {grids[0][0]} x {grids[0][1]} patches throughout "
            f"take; at least {costs[0]:.3f}"
        )
    prices = np.asarray(costs, dtype=np.float64)
    before = np.concatenate([[0.0], np.cumsum(samples)])  # samples before each step
    total = float(before[-1])

    def spent(counts: Ints) -> float:
        ends = np.cumsum(counts)
        return float((before[ends] - before[ends - counts]) @ prices)

    counts = np.zeros(len(prices), dtype=np.int64)
    end = len(samples)
    for level, share in reversed(list(enumerate(_shares(prices, budget)))):
        least = before[end] - share * total
        start = int(np.searchsorted(before, least - 1e-9 * total)) if level else 0
        counts[level], end = end - min(start, end), min(start, end)
    # What rounding has left goes to the dearest steps that still fit.
    for level in range(len(counts) - 1, 0, -1):
        for below in range(level):
            while counts[below]:
                dearer = counts.copy()
                dearer[[below, level]] += (-1, 1)
                if spent(dearer) > (budget + 1e-9) * total:
                    break
                counts = dearer
    return TokenCurve(tuple(grids), tuple(counts.tolist()), spent(counts) / total)


def _shares(costs: Floats, budget: float) -> Floats:
    """The shares of the samples, float64 [grid], with the largest entropy among those whose mean cost is the budget."""

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
