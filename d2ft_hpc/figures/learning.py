"""Training loss and accuracy against measured time: steps, scoring and planning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from d2ft_hpc.errors import ResultsError
from d2ft_hpc.figures.run import Run
from d2ft_hpc.figures.style import Figure, end_at_100, legend_below, line_style, new_figure, say, short, thin


def measure(runs: Sequence[Run], smooth: int = 20) -> dict[str, Any]:
    """Curves of each run. smooth: most steps in the moving average of the loss; less in short runs."""
    if smooth < 1:
        raise ResultsError(f"--smooth {smooth}: give at least 1")
    return {"runs": [_curves(run, smooth) for run in runs]}


def _curves(run: Run, smooth: int) -> dict[str, Any]:
    known = np.isfinite(run.steps["loss"])
    loss, steps = run.steps["loss"][known], run.steps["step"][known]
    seconds = run.results.elapsed_seconds(steps + 1)
    window = max(1, min(smooth, len(loss) // 5))
    if window > 1:
        loss = np.convolve(loss, np.full(window, 1 / window), mode="valid")
    return {
        "name": run.name,
        "loss_seconds": thin(seconds[window - 1 :]),
        "loss": thin(loss),
        "accuracy_seconds": run.results.elapsed_seconds(run.evaluations["step"]),
        "accuracy": run.evaluations["accuracy"],
    }


def draw(numbers: dict[str, Any]) -> Figure:
    """Loss on the left, accuracy on the right."""
    figure = new_figure(12, 5)
    left, right = figure.subplots(1, 2)
    for i, run in enumerate(numbers["runs"]):
        label = short(run["name"])
        left.plot(run["loss_seconds"], run["loss"], label=label, **line_style(i))
        right.plot(
            run["accuracy_seconds"],
            100 * np.asarray(run["accuracy"]),
            marker="o",
            label=label,
            **line_style(i),
        )
    left.set(title="Training loss (moving mean)", ylabel="loss")
    right.set(title="Accuracy", ylabel="top-1 accuracy (%)")
    end_at_100(right)
    for axis in (left, right):
        axis.set_xlabel("training, scoring and planning time (s)")
        axis.grid(alpha=0.3)
        if not any(len(line.get_xdata()) for line in axis.get_lines()):
            say(axis, "nothing recorded")
    legend_below(figure)
    return figure
