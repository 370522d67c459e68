"""What a run's plans do: how large its images are, which heads run where, and how both change over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from d2ft_hpc.errors import ResultsError
from d2ft_hpc.figures.run import Run
from d2ft_hpc.figures.style import COLOURS, Figure, heat_map, new_figure, short, whole_numbers

OPERATIONS = ("SHORTCUT", "FORWARD_ONLY", "FULL")
_MOST_NAMED_GRIDS = 10


def measure(runs: Sequence[Run], plan: int | None = None) -> dict[str, Any]:
    """Shares of the rows or heads that run each operation, in each run's plans or in the one that is named, and the
    image sizes that these plans train on.

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
    steps = np.append(run.plans["step"], run.steps["step"][-1:] + 1)
    return {
        "name": run.name,
        "plans": indices,
        "first_steps": run.plans["step"][indices],
        "end": int(
            steps[indices[-1] + 1 :][:1].max(initial=steps[indices[-1]])
        ),  # the first step after these plans
        "grids": [_grids(run, index) for index in indices],
        "skips": not all(one.all() for one in is_full),
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


def _grids(run: Run, index: int) -> list[list[int]]:
    """The different grids of a plan's rows, patches [down, across]; empty if images stay as the loader gives them."""
    grids = run.plans["grids"][index].reshape(-1, 2)
    return [[int(down), int(across)] for down, across in np.unique(grids[(grids > 0).all(axis=1)], axis=0)]


def draw(numbers: dict[str, Any]) -> Figure:
    """A line of panels for each run: image size over time where plans set it; where they skip heads, block x head for
    each operation, FULL over time and FULL by micro-batch."""
    runs = numbers["runs"]
    figure = new_figure(17, 0.6 + 3.6 * len(runs))
    for part, run in zip(figure.subfigures(len(runs), 1, squeeze=False)[:, 0], runs, strict=True):
        scaled = any(run["grids"])
        cells = 5 if run["skips"] or not scaled else 0
        axes = list(part.subplots(1, scaled + cells, squeeze=False)[0])
        axes[0].set_ylabel(short(run["name"], 24))
        if scaled:
            _draw_grids(axes.pop(0), run)
        if cells:
            part.colorbar(_draw_cells(axes, run), ax=axes, label="share (%)", pad=0.01)
    return figure


def _draw_grids(axis: Any, run: dict[str, Any]) -> None:
    edges = [*map(int, run["first_steps"]), run["end"]]
    for index, grids in enumerate(run["grids"]):
        for down, across in grids:
            axis.plot(edges[index : index + 2], [down * across] * 2, color=COLOURS[0], linewidth=4)
    different = sorted(
        {(down * across, f"{down} x {across}") for grids in run["grids"] for down, across in grids}
    )
    if len(different) <= _MOST_NAMED_GRIDS:
        axis.set_yticks(*zip(*different, strict=True))
    axis.set(title="Images in training", xlabel="step", ylim=(0, 1.1 * different[-1][0]))
    axis.set_ylabel(f"{axis.get_ylabel()}\npatches of an image, down x across")
    axis.grid(alpha=0.3)
    whole_numbers(axis)


def _draw_cells(axes: Sequence[Any], run: dict[str, Any]) -> Any:
    """Returns the last image, for the colours' scale."""
    for axis, name in zip(axes, reversed(OPERATIONS), strict=False):
        share = np.asarray(run["share"][name])
        heat_map(axis, 100 * share, vmin=0, vmax=100)
        axis.set(title=f"{name}: {share.mean():.1%}", xlabel="head")
    axes[0].set_ylabel(f"{axes[0].get_ylabel()}\nblock".lstrip())
    heat_map(axes[3], 100 * np.asarray(run["full_by_plan"]).T, vmin=0, vmax=100)
    axes[3].set(title="FULL over time", xlabel="plan")
    image = heat_map(axes[4], 100 * np.asarray(run["full_by_row"]).T, vmin=0, vmax=100)
    axes[4].set(title="FULL by micro-batch", xlabel="row: slot x replicas + replica")
    return image
