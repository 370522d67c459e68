"""Compares the compute and time that plans promised with what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from d2ft_hpc.figures.run import Run, share
from d2ft_hpc.figures.style import Figure, legend_below, marker_style, new_figure, say, short


def measure(runs: Sequence[Run]) -> dict[str, Any]:
    """Shares of the dense step, by plan: planned and executed compute, predicted and measured time.

    The predicted time is the slowest rank's planned share of the FLOPs. The measured time is relative to that of the
    first dense run, None without one. Both are medians over the steps, of the slowest rank's time without waiting for
    data.
    """
    dense = next((run for run in runs if run.is_dense), None)
    baseline = None if dense is None else float(np.median(dense.per_dense_flop(dense.busy_seconds)))
    return {
        "baseline": None if dense is None else dense.name,
        "runs": [_of_run(run, baseline) for run in runs],
    }


def _of_run(run: Run, baseline: float | None) -> dict[str, Any]:
    steps = run.steps
    seconds = run.per_dense_flop(run.busy_seconds)
    of_plans: dict[str, list[Any]] = {
        name: [] for name in ("plan", "planned", "executed", "predicted_time", "measured_time")
    }
    for plan in np.unique(steps["plan"]):
        chosen = steps["plan"] == plan
        of_plans["plan"].append(int(plan))
        of_plans["planned"].append(share(steps["planned_flops"][chosen], steps["dense_flops"][chosen]))
        of_plans["executed"].append(share(steps["executed_flops"][chosen], steps["dense_flops"][chosen]))
        planned, dense = steps["planned_flops"][chosen].sum(axis=0), steps["dense_flops"][chosen].sum(axis=0)
        of_plans["predicted_time"].append(
            float(np.max(planned / dense)) if dense.size and dense.all() else None
        )
        measured = None if baseline is None else float(np.median(seconds[chosen])) / baseline
        of_plans["measured_time"].append(measured)
    return {"name": run.name, **of_plans}


def draw(numbers: dict[str, Any]) -> Figure:
    """Compute on the left, time on the right; on the diagonal a promise is kept."""
    figure = new_figure(11, 5.4)
    panels = (("planned", "executed", "compute"), ("predicted_time", "measured_time", "time"))
    for axis, (x, y, what) in zip(figure.subplots(1, 2), panels, strict=True):
        largest, drawn = 100.0, 0
        for i, run in enumerate(numbers["runs"]):
            pairs = [
                (100 * a, 100 * b)
                for a, b in zip(run[x], run[y], strict=True)
                if a is not None and b is not None
            ]
            if pairs:
                axis.plot(
                    *zip(*pairs, strict=True),
                    linestyle="",
                    markersize=8,
                    label=short(run["name"]),
                    **marker_style(i),
                )
                drawn += len(pairs)
                largest = max([largest, *(value for pair in pairs for value in pair if np.isfinite(value))])
        limits = (0, 1.08 * largest)
        axis.plot(limits, limits, color="0.5", lw=1, label="as promised")
        axis.set(
            xlim=limits,
            ylim=limits,
            title=what.capitalize(),
            aspect="equal",
            xlabel=f"promised {what} (% of a dense step's)",
            ylabel=f"measured {what} (% of a dense step's)",
        )
        axis.grid(alpha=0.3)
        if not drawn:
            say(axis, "needs a dense run\nto compare with")
    if numbers["baseline"]:
        figure.axes[1].set_ylabel(f"measured time (% of {short(numbers['baseline'])})")
    legend_below(figure)
    return figure
