"""Accuracy against what it cost: measured time, executed compute and bytes sent, of many runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from d2ft_hpc.figures.run import Run
from d2ft_hpc.figures.style import Figure, end_at_100, legend_below, marker_style, new_figure, say, short

_COSTS = {
    "seconds": ("training, scoring and planning time (s)", 1.0),
    "flops": ("compute executed, all ranks (TFLOP)", 1e12),
    "bytes": ("bytes sent, all ranks (MB)", 1e6),
}
_EQUAL = 0.1


def measure(runs: Sequence[Run]) -> dict[str, Any]:
    """Cost and accuracy of each run at its end and at every evaluation.

    `rivals`: for each run that is not dense, the dense run whose total compute is nearest to its own, if they differ
    by at most 10 %; and the best accuracy that dense runs had reached when they had spent as much.
    """
    measured = [_costs(run) for run in runs]
    dense = [run for run in measured if run["dense"]]
    return {
        "runs": measured,
        "rivals": [_rival(run, dense) for run in measured if not run["dense"]] if dense else [],
    }


def _costs(run: Run) -> dict[str, Any]:
    evaluations = run.evaluations
    return {
        "name": run.name,
        "dense": run.is_dense,
        "accuracy": run.accuracy,
        "seconds": run.total_seconds,
        "flops": run.total_flops,
        "bytes": run.total_bytes,
        "on_the_way": {
            "accuracy": evaluations["accuracy"],
            "seconds": run.results.elapsed_seconds(evaluations["step"]),
            "flops": run.curve("executed_flops"),
            "bytes": run.curve("bytes_sent"),
        },
    }


def _rival(run: dict[str, Any], dense: list[dict[str, Any]]) -> dict[str, Any]:
    near = min(dense, key=lambda other: abs(other["flops"] - run["flops"]))
    equal = abs(near["flops"] - run["flops"]) <= _EQUAL * run["flops"]
    reached = [
        float(np.interp(run["flops"], other["on_the_way"]["flops"], other["on_the_way"]["accuracy"]))
        for other in dense
        if len(other["on_the_way"]["flops"])
    ]
    return {
        "run": run["name"],
        "accuracy": run["accuracy"],
        "dense_of_equal_compute": near["name"] if equal else None,
        "its_accuracy": near["accuracy"] if equal else None,
        "dense_on_its_way": max(reached, default=float("nan")),
    }


def draw(numbers: dict[str, Any]) -> Figure:
    """A panel for each cost; dense runs are stars, with a line through their earlier evaluations."""
    figure = new_figure(14, 5)
    for axis, (cost, (label, unit)) in zip(figure.subplots(1, 3, sharey=True), _COSTS.items(), strict=True):
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
        costs = [run[cost] for run in numbers["runs"]]
        if not np.any(costs) or not np.isfinite(costs).any():
            say(axis, "not recorded" if np.any(costs) else "nothing was sent")
            axis.set_xticks([])
            continue
        for i, run in enumerate(numbers["runs"]):
            x, y = run[cost] / unit, 100 * run["accuracy"]
            style = {**marker_style(i), "markersize": 8}
            if run["dense"]:
                style |= {"marker": "*", "markersize": 14}
                way = run["on_the_way"]
                axis.plot(
                    np.asarray(way[cost]) / unit,
                    100 * np.asarray(way["accuracy"]),
                    color=style["color"],
                    linewidth=1,
                    alpha=0.6,
                )
            axis.plot([x], [y], linestyle="", label=short(run["name"]), **style)
    reached = [100 * run["accuracy"] for run in numbers["runs"] if np.isfinite(run["accuracy"])]
    if reached:  # early evaluations may lie far below and are cut off; a dense run's best is always shown
        ways = [run["on_the_way"]["accuracy"] for run in numbers["runs"] if run["dense"]]
        best = max([*reached, *(100 * float(accuracy) for way in ways for accuracy in way)])
        margin = max(1.0, 0.4 * (max(reached) - min(reached)))
        figure.axes[0].set_ylim(min(reached) - margin, max(best, min(max(reached) + margin, 100)) + 0.5)
    for axis in figure.axes:
        end_at_100(axis)
    figure.axes[0].set_ylabel("top-1 accuracy (%)")
    figure.suptitle(
        "Accuracy against cost (stars: dense runs; lines: what they had reached before their end)"
    )
    legend_below(figure)
    return figure
