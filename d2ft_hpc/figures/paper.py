"""The paper's claims beside what was measured.

Of "You Don't Need All Attentions" (arXiv 2504.12471) the claims of its abstract are used: 40 % less compute and 50 %
less communication for 1 to 2 points of accuracy on CIFAR-10, CIFAR-100 and Stanford Cars, and with LoRA 4 to 6 points
on Stanford Cars for one of the two. Its detailed tables are not reproduced here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from d2ft_hpc.figures.run import Run
from d2ft_hpc.figures.style import COLOURS, name_ticks, new_figure, number, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Claim:
    """What the paper's abstract says: shares saved, and the accuracy lost at most, in points."""

    compute_saved: float
    communication_saved: float
    least_drop: float
    most_drop: float


CLAIM = Claim(0.40, 0.50, 1.0, 2.0)
DATA_SETS = ("cifar10", "cifar100", "stanford_cars")
"""Those that the claim is about."""


def measure(runs: Sequence[Run]) -> dict[str, Any]:
    """Each run that is not dense against the mean of the dense runs with the same model, data and ranks.

    Savings are of a step: shares of what the dense model would have computed, and of what the dense runs' steps sent
    and took. Drops are in points, against dense runs of as many steps if there are any. Runs that did not end in order
    are left out.
    """
    dense: dict[tuple[Any, ...], list[Run]] = {}
    ended = [run for run in runs if run.complete]
    for run in ended:
        if run.is_dense:
            dense.setdefault(_task(run), []).append(run)
    compared = []
    for run in ended:
        if run.is_dense or _task(run) not in dense:
            continue
        rivals = dense[_task(run)]
        as_long = [rival for rival in rivals if _steps(rival) == _steps(run)] or rivals
        sent = np.mean([rival.total_bytes / _steps(rival) for rival in as_long])
        time = np.mean([rival.train_seconds / _steps(rival) for rival in as_long])
        compared.append(
            {
                "name": run.name,
                "data": str(_task(run)[1]),
                "claimed": _task(run)[1] in DATA_SETS,
                "dense_runs": [rival.name for rival in as_long],
                "compute_saved": 1 - run.measured_compute,
                "communication_saved": 1 - run.total_bytes / _steps(run) / sent if sent > 0 else float("nan"),
                "time_saved": 1 - (run.train_seconds + run.preparation_seconds) / _steps(run) / time,
                "drop": 100 * (np.mean([rival.accuracy for rival in as_long]) - run.accuracy),
            }
        )
    return {"claim": vars(CLAIM), "data_sets": list(DATA_SETS), "runs": compared}


def _steps(run: Run) -> int:
    return max(1, len(run.steps["step"]))


def _task(run: Run) -> tuple[Any, ...]:
    """What two runs must share to be compared: the model's name, the data's, and how a step is spread over ranks."""
    config = run.config or {}
    data = config.get("data", {})
    spread = [data.get(key) for key in ("classes", "micro_batch_size", "slots")]
    return config.get("model", {}).get("name"), data.get("name"), str(spread), run.world_size


def table(numbers: dict[str, Any]) -> list[list[str]]:
    """A heading row, the paper's, and a row for each run, as text."""
    claim = numbers["claim"]
    rows = [["", "data", "compute saved %", "communication saved %", "time saved %", "top-1 lost (points)"]]
    rows.append(
        [
            "paper (abstract)",
            ", ".join(numbers["data_sets"]),
            f"{100 * claim['compute_saved']:.0f}",
            f"{100 * claim['communication_saved']:.0f}",
            "-",
            f"{claim['least_drop']:g} to {claim['most_drop']:g}",
        ]
    )
    for run in numbers["runs"]:
        saved = [number(100 * run[f"{what}_saved"], ".1f") for what in ("compute", "communication", "time")]
        rows.append([run["name"], run["data"], *saved, number(run["drop"], ".2f")])
    return rows


def draw(numbers: dict[str, Any]) -> Figure:
    """Bars of what was saved and lost; lines where the paper's claims lie."""
    claim, runs = numbers["claim"], numbers["runs"]
    figure = new_figure(14, 5)
    panels = (
        ("compute_saved", "compute saved (%)", 100, (claim["compute_saved"],) * 2),
        ("communication_saved", "communication saved (%)", 100, (claim["communication_saved"],) * 2),
        ("drop", "top-1 accuracy lost (points)", 1, (claim["least_drop"], claim["most_drop"])),
    )
    for axis, (key, label, factor, (low, high)) in zip(figure.subplots(1, 3), panels, strict=True):
        values = [factor * run[key] for run in runs]
        bars = axis.bar(range(len(runs)), np.nan_to_num(values), color=COLOURS[0], label="measured")
        axis.bar_label(bars, [number(value, ".1f") for value in values], fontsize="small", padding=2)
        if low == high:
            axis.axhline(factor * low, color=COLOURS[1], lw=2, ls="--", label="paper's abstract")
        else:
            axis.axhspan(factor * low, factor * high, color=COLOURS[1], alpha=0.4, label="paper's abstract")
        name_ticks(axis, [f"{run['name']} ({run['data']})" for run in runs])
        axis.axhline(0, color="black", lw=0.8)
        axis.set(ylabel=label)
        axis.margins(y=0.15)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        if not runs:
            say(axis, "needs a dense run and one under a plan,\nof the same model and data")
    unique: dict[str, Any] = {}
    for axis in figure.axes:
        unique |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(
        [unique[label] for label in unique],
        list(unique),
        loc="outside lower center",
        ncols=3,
        fontsize="small",
    )
    figure.suptitle("Beside the paper, whose claims are for " + ", ".join(numbers["data_sets"]))
    return figure
