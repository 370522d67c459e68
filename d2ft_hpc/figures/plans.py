"""What a run's plans do: where in the model, in which micro-batch, and how it changes over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from d2ft_hpc.errors import ResultsError
from d2ft_hpc.figures.run import Run
from d2ft_hpc.figures.style import heat_map, new_figure, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPERATIONS = ("SHORTCUT", "FORWARD_ONLY", "FULL")


def measure(runs: Sequence[Run], plan: int | None = None) -> dict[str, Any]:
    """Shares of the rows or heads that run each operation, in each run's plans or in the one that is named.

    Raises ResultsError if a run has no such plan.
    """
    return {"runs": [_of_run(run, plan) for run in runs]}


def _of_run(run: Run, plan: int | None) -> dict[str, Any]:
    count = len(run.plans["step"])
    if count == 0 or (plan is not None and not 0 <= plan < count):
        raise ResultsError(f"{run.path} has no plan {'' if plan is None else plan}".rstrip())
    indices = list(range(count)) if plan is None else [plan]
    operations = [run.results.plan(index) for index in indices] if plan is not None else _all_plans(run)
    is_full = [(one == 2) for one in operations]
    rows = min(len(one) for one in operations)
    return {
        "name": run.name,
        "plans": indices,
        "first_steps": run.plans["step"][indices],
        "share": {  # [block, head]
            name: np.mean([(one == code).mean(axis=0) for one in operations], axis=0)
            for code, name in enumerate(OPERATIONS)
        },
        "full_by_plan": [one.mean(axis=(0, 2)) for one in is_full],  # [plan, block]
        "full_by_row": np.mean([one[:rows].mean(axis=2) for one in is_full], axis=0),  # [row, block]
    }


def _all_plans(run: Run) -> list[Any]:
    whole = run.plans["operations"]
    return list(whole) if (whole != 255).all() else [run.results.plan(i) for i in range(len(whole))]


def draw(numbers: dict[str, Any]) -> Figure:
    """A row of panels for each run: block x head for each operation, FULL over time, FULL by micro-batch."""
    runs = numbers["runs"]
    figure = new_figure(17, 0.6 + 3.6 * len(runs))
    panels = figure.subplots(len(runs), 5, squeeze=False)
    image: Any = None
    for axes, run in zip(panels, runs, strict=True):
        for axis, name in zip(axes, reversed(OPERATIONS), strict=False):
            share = np.asarray(run["share"][name])
            image = heat_map(axis, 100 * share, vmin=0, vmax=100)
            axis.set(title=f"{name}: {share.mean():.1%}", xlabel="head")
        over_time, by_row = np.asarray(run["full_by_plan"]), np.asarray(run["full_by_row"])
        heat_map(axes[3], 100 * over_time.T, vmin=0, vmax=100)
        axes[3].set(title="FULL over time", xlabel="plan")
        heat_map(axes[4], 100 * by_row.T, vmin=0, vmax=100)
        axes[4].set(title="FULL by micro-batch", xlabel="row: slot x replicas + replica")
        axes[0].set_ylabel(f"{short(run['name'], 24)}\nblock")
    figure.colorbar(image, ax=panels.ravel().tolist(), label="share (%)", pad=0.01)
    return figure
