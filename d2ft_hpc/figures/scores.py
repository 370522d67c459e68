"""Contribution scores over the blocks and heads of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from d2ft_hpc.errors import ResultsError
from d2ft_hpc.figures.run import Run
from d2ft_hpc.figures.style import COLOURS, Figure, heat_map, legend_below, new_figure, short, whole_numbers

_KINDS: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")


def measure(runs: Sequence[Run], index: int = -1) -> dict[str, Any]:
    """Each run's scores, the mean over its rows. index: which of the run's measurements; -1: the last.

    Raises ResultsError if none of the runs has scores.
    """
    measured = [_of_run(run, index) for run in runs if len(run.results.table("scores", ["step"])["step"])]
    if not measured:
        planners = sorted({str(run.setting("plan.planner")) for run in runs})
        raise ResultsError(
            f"no scores in these runs: planner {', '.join(planners)} reads none; give runs of another, such as joint"
        )
    return {"runs": measured}


def _of_run(run: Run, index: int) -> dict[str, Any]:
    table = run.results.table("scores", ["forward_name", "backward_name"])
    data: dict[str, Any] = {"name": run.name}
    for kind in _KINDS:
        scores = run.results.score(index, kind)
        data[kind] = scores.mean(axis=0)  # [block, head]
        data[f"{kind}_spread"] = scores.std(axis=0)
        data[f"{kind}_name"] = str(table[f"{kind}_name"][index])
    return data


def draw(numbers: dict[str, Any]) -> Figure:
    """For each run and kind of score: block x head, and all heads of every block."""
    runs = numbers["runs"]
    figure = new_figure(16, 0.4 + 3.6 * len(runs))
    for axes, run in zip(figure.subplots(len(runs), 4, squeeze=False), runs, strict=True):
        for left, right, kind in ((axes[0], axes[1], "forward"), (axes[2], axes[3], "backward")):
            scores, spread = np.asarray(run[kind]), np.asarray(run[f"{kind}_spread"])
            name = run[f"{kind}_name"].replace("_", " ")
            wide = bool((scores > 0).all() and scores.max() > 30 * scores.min())
            image = heat_map(left, scores, norm="log" if wide else None)
            left.set(title=f"{kind} score" + (f": {name}" if name else ""), xlabel="head", ylabel="block")
            figure.colorbar(image, ax=left)
            blocks = np.arange(len(scores))
            aside = 0.5 * (np.arange(scores.shape[1]) / max(scores.shape[1] - 1, 1) - 0.5)
            right.errorbar(
                (blocks[:, None] + aside).ravel(),
                scores.ravel(),
                spread.ravel(),
                linestyle="",
                marker="o",
                markersize=4,
                color=COLOURS[0],
                ecolor="0.7",
                label="head (bar: standard deviation over rows)",
            )
            right.plot(blocks, scores.mean(axis=1), color=COLOURS[1], label="mean of the block")
            right.set(title=f"{kind} score, by block", xlabel="block", ylabel="score")
            whole_numbers(right)
            right.grid(alpha=0.3)
            if wide:
                right.set_yscale("log")
        axes[0].set_ylabel(f"{short(run['name'], 24)}\nblock")
    legend_below(figure)
    return figure
