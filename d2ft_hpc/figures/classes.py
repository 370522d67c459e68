"""Which classes a run tells apart: accuracy of each class over time, and the last confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from d2ft_hpc.figures.run import Run
from d2ft_hpc.figures.style import COLOURS, Figure, heat_map, name_ticks, new_figure, say, short

_WRITTEN = 20


def measure(runs: Sequence[Run]) -> dict[str, Any]:
    """For each run's last evaluation: accuracy by class, and samples by label and prediction. Classes that the run did
    not name have their labels as names."""
    return {"runs": [_of_run(run) for run in runs]}


def _of_run(run: Run) -> dict[str, Any]:
    accuracy, confusion = run.evaluations["class_accuracy"], run.evaluations["confusion"]
    recorded = len(confusion) > 0 and confusion.shape[1] > 0
    last = accuracy[-1] if len(accuracy) else []
    names = [str(name) for name in run.results.datasets("model").get("class_name", [])]
    return {
        "name": run.name,
        "classes": names if len(names) == len(last) else [str(label) for label in range(len(last))],
        "class_accuracy": last,
        "confusion": confusion[-1] if recorded else None,
    }


def draw(numbers: dict[str, Any]) -> Figure:
    """A row for each run: accuracy of each class, and the confusion matrix by share of the label's samples."""
    runs = numbers["runs"]
    figure = new_figure(12, 0.4 + 4.4 * len(runs))
    for (left, right), run in zip(figure.subplots(len(runs), 2, squeeze=False), runs, strict=True):
        accuracy = np.asarray(run["class_accuracy"], dtype=float)
        left.bar(np.arange(len(accuracy)), 100 * np.nan_to_num(accuracy), color=COLOURS[0])
        left.set(
            title=f"{short(run['name'])}: accuracy by class",
            xlabel="class",
            ylabel="accuracy (%)",
            ylim=(0, 100),
        )
        left.grid(axis="y", alpha=0.3)
        left.set_axisbelow(True)
        if len(accuracy) <= _WRITTEN:
            name_ticks(left, run["classes"])
        if run["confusion"] is None:
            right.set_axis_off()
            say(right, "no confusion matrix recorded")
            continue
        counts = np.asarray(run["confusion"], dtype=float)
        shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        image = heat_map(right, shares, vmin=0, vmax=100)
        written = len(counts) <= _WRITTEN
        if written and len(counts) == len(run["classes"]):
            name_ticks(right, run["classes"])
            right.set_yticks(range(len(counts)), [short(name, 22) for name in run["classes"]])
        right.set(
            title="confusion (numbers: samples)" if written else "confusion",
            xlabel="prediction",
            ylabel="label",
        )
        figure.colorbar(image, ax=right, label="share of the label's samples (%)")
        if written:
            for (label, prediction), count in np.ndenumerate(counts):
                ink = "black" if shares[label, prediction] > 55 else "white"
                right.text(
                    prediction, label, f"{count:.0f}", ha="center", va="center", color=ink, fontsize="small"
                )
    return figure
