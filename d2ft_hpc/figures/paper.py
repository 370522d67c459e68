"""The paper's claims beside what was measured. They are from "You Don't Need All Attentions" (arXiv 2504.12471): 40 %
less compute and 50 % less communication for a top-1 drop of 1 to 2 points on CIFAR-10, CIFAR-100 and Stanford Cars,
and with LoRA one of the two for 4 to 6 points on Stanford Cars (abstract); by data set the drops are 0.9, 2 and 2
points (a summary of the paper). Its tables were not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_hpc.figures.run import Run
from d2ft_hpc.figures.style import COLOURS, Figure, legend_below, name_ticks, new_figure, number, say


@dataclass(frozen=True)
class Claim:
    """What the paper claims for a data set: shares saved, and accuracy lost in points."""

    compute_saved: float
    communication_saved: float
    least_drop: float
    most_drop: float
    both: bool = True
    """Both savings at once, or one of the two."""


CLAIMS = {
    ("cifar10", False): Claim(0.40, 0.50, 0.9, 1.0),
    ("cifar100", False): Claim(0.40, 0.50, 2.0, 2.0),
    ("stanford_cars", False): Claim(0.40, 0.50, 2.0, 2.0),
    ("stanford_cars", True): Claim(0.40, 0.50, 4.0, 6.0, both=False),
}
"""By the data set's name and whether LoRA was trained."""


def measure(runs: Sequence[Run]) -> dict[str, Any]:
    """Each run that is not dense against the mean of the dense runs with the same model, data and ranks.

    Savings are averages over steps: compute as a share of what the dense model would have computed, bytes and time as
    shares of the dense runs' steps. Drops are in points, against dense runs with equally many steps if there are any.
    Runs that did not end in order are left out.
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
        data, lora = data_set(run), _is_lora(run)
        claim = CLAIMS.get((data, lora))
        as_long = [rival for rival in rivals if _steps(rival) == _steps(run)] or rivals
        sent = np.mean([rival.total_bytes / _steps(rival) for rival in as_long])
        time = np.mean([rival.train_seconds / _steps(rival) for rival in as_long])
        compared.append(
            {
                "name": run.name,
                "data": data,
                "lora": lora,
                "claim": None if claim is None else vars(claim),
                "dense_runs": [rival.name for rival in as_long],
                "compute_saved": 1 - run.measured_compute,
                "communication_saved": 1 - run.total_bytes / _steps(run) / sent if sent > 0 else float("nan"),
                "time_saved": 1 - run.total_seconds / _steps(run) / time,
                "drop": 100 * (np.mean([rival.accuracy for rival in as_long]) - run.accuracy),
            }
        )
    return {"runs": sorted(compared, key=lambda each: (each["data"], each["lora"]))}


def data_set(run: Run) -> str:
    """The data set's name. For a packed file it is the known data set that the file's name contains, else the file's
    name."""
    name = run.setting("data.name")
    if name != "packed":
        return str(name)
    file = Path(str(run.setting("data.root"))).stem
    return max((name for name, _ in CLAIMS if name in file), key=len, default=file)


def _is_lora(run: Run) -> bool:
    return run.setting("model.lora") is not None


def _steps(run: Run) -> int:
    return max(1, len(run.steps["step"]))


def _task(run: Run) -> tuple[Any, ...]:
    """What two runs must share to be compared: model, LoRA or not, data, and how a step is spread over ranks."""
    spread = [run.setting(f"data.{key}") for key in ("classes", "micro_batch_size", "slots")]
    return run.setting("model.name"), _is_lora(run), data_set(run), str(spread), run.world_size


def table(numbers: dict[str, Any]) -> list[list[str]]:
    """A heading row, then the runs, those of a data set below the paper's row for it, as text."""
    rows = [["", "data", "compute saved %", "communication saved %", "time saved %", "top-1 lost (points)"]]
    told = None
    for run in numbers["runs"]:
        data = _data(run)
        if run["claim"] is not None and data != told:
            rows.append(["paper", data, *_claimed(run["claim"])])
            told = data
        saved = [number(100 * run[f"{what}_saved"], ".1f") for what in ("compute", "communication", "time")]
        rows.append([run["name"], data, *saved, number(run["drop"], ".2f")])
    return rows


def _data(run: dict[str, Any]) -> str:
    return f"{run['data']}, LoRA" if run["lora"] else str(run["data"])


def _claimed(claim: dict[str, Any]) -> list[str]:
    compute, communication = (f"{100 * claim[key]:.0f}" for key in ("compute_saved", "communication_saved"))
    drops = sorted({claim["least_drop"], claim["most_drop"]})
    return [
        compute,
        communication if claim["both"] else f"or {communication}",
        "-",
        " to ".join(f"{drop:g}" for drop in drops),
    ]


def draw(numbers: dict[str, Any]) -> Figure:
    """Bars of what was saved and lost; a line across a run's bar shows the paper's claim for its data set."""
    runs = numbers["runs"]
    figure = new_figure(14, 5)
    panels = (
        ("compute_saved", "compute saved (%)", 100, ("compute_saved", "compute_saved")),
        (
            "communication_saved",
            "communication saved (%)",
            100,
            ("communication_saved", "communication_saved"),
        ),
        ("drop", "top-1 accuracy lost (points)", 1, ("least_drop", "most_drop")),
    )
    place = np.arange(len(runs))
    for axis, (key, label, factor, limits) in zip(figure.subplots(1, 3), panels, strict=True):
        values = [factor * run[key] for run in runs]
        bars = axis.bar(place, np.nan_to_num(values), 0.6, color=COLOURS[0], label="measured")
        axis.bar_label(bars, [number(value, ".1f") for value in values], fontsize="small", padding=2)
        if not np.isfinite(values).any():
            say(
                axis,
                "not recorded"
                if runs
                else "needs a dense run and one under a plan,\nof the same model and data",
            )
        claimed = [i for i, run in enumerate(runs) if run["claim"] is not None]
        for limit in sorted(set(limits)) if claimed else ():
            heights = [factor * runs[i]["claim"][limit] for i in claimed]
            left, right = place[claimed] - 0.42, place[claimed] + 0.42
            axis.hlines(heights, left, right, color=COLOURS[1], linewidth=3, label="the paper's claim")
        name_ticks(axis, [f"{run['name']} ({_data(run)})" for run in runs])
        axis.axhline(0, color="black", lw=0.8)
        axis.set(ylabel=label, xlim=(-0.8, len(runs) - 0.2))
        axis.margins(y=0.15)
        # Bars that rounding alone keeps from zero are drawn as zero.
        axis.set_ylim(top=max(axis.get_ylim()[1], 1))
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    legend_below(figure)
    figure.suptitle("Savings and losses beside the paper's claims for the same data set")
    return figure
