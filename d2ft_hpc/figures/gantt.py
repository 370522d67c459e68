"""What every rank did during some steps, phase after phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from d2ft_hpc.errors import ResultsError
from d2ft_hpc.figures.run import Run
from d2ft_hpc.figures.style import PHASE_STYLES, Figure, boxes, legend_below, new_figure, say, short
from d2ft_hpc.figures.workload import phase_seconds

_ORDER = ("data", "forward", "backward", "waiting", "communication", "optimizer", "other")
_MOST_RANKS = 64


def measure(runs: Sequence[Run], first: int | None = None, steps: int = 4) -> dict[str, Any]:
    """Seconds by phase, step and rank. first: the first step shown; by default those in the middle of the run.

    Phases are measured as sums over a step's micro-batches, so their order within a step is a drawing, not a record;
    all ranks are drawn as if they began each step together.
    """
    if steps < 1:
        raise ResultsError(f"--steps {steps}: give at least 1")
    return {"runs": [_of_run(run, first, steps) for run in runs]}


def _of_run(run: Run, first: int | None, steps: int) -> dict[str, Any]:
    recorded = run.steps["step"]
    if first is None:
        start = max(0, len(recorded) // 2 - steps // 2)
    elif len(recorded) and recorded[0] <= first <= recorded[-1]:
        start = int(np.searchsorted(recorded, first))
    else:
        raise ResultsError(f"{run.path} has no step {first}: it has {len(recorded)} steps")
    chosen = slice(start, start + steps)
    return {
        "name": run.name,
        "steps": recorded[chosen],
        "seconds": {phase: np.nan_to_num(values[chosen]) for phase, values in phase_seconds(run).items()},
    }


def draw(numbers: dict[str, Any]) -> Figure:
    """A panel for each run, a line for each rank."""
    runs = numbers["runs"]
    heights = [1.3 + _line_height(run) * _shown_ranks(run) for run in runs]
    figure = new_figure(13, 0.8 + sum(heights))
    panels = figure.subplots(len(runs), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, run in zip(panels, runs, strict=True):
        ranks = _shown_ranks(run)
        axis.set(title=short(run["name"]), xlabel="time since the first step shown (ms)", ylabel="rank")
        if ranks == 0:
            say(axis, "nothing recorded")
            continue
        begin = 0.0
        for step, number in enumerate(run["steps"]):
            left = np.full(ranks, begin)
            for phase in _ORDER:
                width = 1e3 * np.asarray(run["seconds"][phase])[step, :ranks]
                middle = np.arange(ranks)
                boxes(
                    axis, left, left + width, middle - 0.4, middle + 0.4, label=phase, **PHASE_STYLES[phase]
                )
                left = left + width
            axis.axvline(begin, color="black", lw=0.8)
            axis.annotate(
                f"step {number}",
                (begin, ranks - 0.45),
                xytext=(3, 0),
                textcoords="offset points",
                fontsize="x-small",
                va="bottom",
            )
            begin = float(left.max())
        axis.set(xlim=(0, begin or 1), ylim=(-0.6, ranks - 0.4 + 0.25 / _line_height(run)))
        axis.set_yticks(range(0, ranks, max(1, ranks // 16)))
    legend_below(figure)
    return figure


def _shown_ranks(run: dict[str, Any]) -> int:
    return min(_MOST_RANKS, int(np.asarray(run["seconds"]["forward"]).shape[1]))


def _line_height(run: dict[str, Any]) -> float:
    """Inches for each rank."""
    return min(0.3, 7 / max(1, _shown_ranks(run)))
