"""How evenly the work is spread: compute of each rank, and where each rank's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from d2ft_hpc.figures.run import Run
from d2ft_hpc.figures.style import (
    COLOURS,
    PHASE_STYLES,
    Figure,
    boxes,
    legend_below,
    new_figure,
    say,
    short,
    whole_numbers,
)


def measure(runs: Sequence[Run]) -> dict[str, Any]:
    """For each run and rank: compute over dense, and mean seconds of a step by phase."""
    return {"runs": [_of_run(run) for run in runs]}


def _of_run(run: Run) -> dict[str, Any]:
    seconds = phase_seconds(run)
    return {
        "name": run.name,
        "compute": run.rank_compute,
        "workload_variance": float(np.var(run.rank_compute)) if run.world_size > 1 else float("nan"),
        "seconds": {phase: _means(values) for phase, values in seconds.items()},
    }


def phase_seconds(run: Run) -> dict[str, Any]:
    """Seconds by phase, each [step, rank]; communication without the waiting in it."""
    seconds = {phase: run.steps[f"{phase}_seconds"].astype(np.float64) for phase in PHASE_STYLES}
    seconds["communication"] = seconds["communication"] - np.nan_to_num(seconds["waiting"])
    return seconds


def _means(values: Any) -> Any:
    known = np.isfinite(values)
    return np.where(known, values, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)


def draw(numbers: dict[str, Any]) -> Figure:
    """A row for each run: compute of each rank, and the phases of its mean step."""
    runs = numbers["runs"]
    figure = new_figure(13, 1.2 + 3.4 * len(runs))
    panels = figure.subplots(len(runs), 2, squeeze=False)
    for (left, right), run in zip(panels, runs, strict=True):
        ranks = np.arange(len(run["compute"]))
        name = short(run["name"])
        compute = 100 * np.nan_to_num(run["compute"])
        boxes(left, ranks - 0.4, ranks + 0.4, np.zeros(len(ranks)), compute, facecolor=COLOURS[0])
        variance = run["workload_variance"]
        title = f"{name}: compute" + (f" (variance {variance:.1e})" if np.isfinite(variance) else "")
        left.set(title=title, xlabel="rank", ylabel="executed compute (% of dense steps)", ylim=(0, 105))
        below = np.zeros(len(ranks))
        for phase, style in PHASE_STYLES.items():
            values = 1e3 * np.asarray(run["seconds"][phase])
            if values.any():
                boxes(right, ranks - 0.4, ranks + 0.4, below, below + values, label=phase, **style)
                below = below + values
        right.set(title=f"{name}: time of the mean step", xlabel="rank", ylabel="time (ms)")
        right.set_ylim(bottom=0)
        for axis in (left, right):
            axis.grid(axis="y", alpha=0.3)
            axis.set_axisbelow(True)
            whole_numbers(axis)
            axis.set_xlim(-1, max(1, len(ranks)))
            if not len(ranks):
                say(axis, "nothing recorded")
    legend_below(figure)
    return figure
