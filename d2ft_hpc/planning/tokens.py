"""Plans by tokens: every head and every sample train, at a resolution that rises through the run (`token_curve`).

In experiments this kept the accuracy of dense training at 0.6 of its compute (analysis/tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from d2ft_hpc.planning.dense import solve_dense
from d2ft_hpc.planning.plan import Grid
from d2ft_hpc.planning.planner import Options, Planner


class TokenOptions(Options):
    """Images begin small and end at data.image_size."""

    sides: list[Annotated[float, Field(gt=0, le=1)]] = Field(default=[0.5, 0.75, 1.0], min_length=1)
    """Sides that images may have in training, in units of data.image_size; rounded to whole patches."""


def grids_of(full: Grid, sides: Sequence[float]) -> list[Grid]:
    """Patches of images whose sides are these shares of one with `full` patches, rising, the full one last."""
    down, across = full
    scaled = {(max(round(side * down), 1), max(round(side * across), 1)) for side in sides}
    return sorted(scaled | {full})


_MANY_EPOCHS = 10


def best_steps_share(compute_budget: float, epochs: int) -> float:
    """The share of all epochs' steps on which their compute budget is best spent. Over many epochs a small budget is
    better spent on fewer steps, whose images can be larger (analysis/tokens); in few every step counts."""
    return min(compute_budget + 0.4, 1.0) if epochs >= _MANY_EPOCHS else 1.0


TOKENS = Planner(
    "tokens",
    "every head on images that begin small and end at full size, so that a run keeps plan.compute_budget",
    solve_dense,
    TokenOptions,
    reads_scores=False,
    keeps_budgets=False,
    scales_images=True,
    makes_few_shapes=True,
)
