"""How little compute and time is enough: the budgets whose finished runs lose no more accuracy than a margin."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from d2ft_hpc.errors import ResultsError
from d2ft_hpc.figures.compare import flat, telling
from d2ft_hpc.figures.run import Run, as_key
from d2ft_hpc.figures.style import COLOURS, Figure, legend_below, new_figure, number, short

_BUDGETS = {
    "plan": ("compute_budget", "token_budget"),
    "train": ("steps_share",),
    "data": ("train_fraction",),
}
"""Keys by which runs of one method differ in what they spend. Under a plan, a share of the steps or images is another
method: at the same compute it is another accuracy, and a line over compute cannot hold both."""


def measure(runs: Sequence[Run], reference: Sequence[Run], margin: float) -> dict[str, Any]:
    """Methods: groups of runs on equally many ranks whose configurations differ only in their seeds and budgets. Only
    finished runs count: while the learning rate still falls, accuracy says nothing about the end.

    margin: points of top-1. A budget is enough if the lower one-sided 95 % bound of the mean difference from the
    reference, paired by seed, is not below -margin. Each method has `budgets`, by rising compute, with compute and
    seconds in units of the reference's, mean difference and bound (NaN with fewer than two common seeds). It also has
    the least `compute` and `seconds` that are enough, interpolated between neighbouring budgets; None if no budget is
    enough.

    Raises ResultsError if the reference has no finished run, a run has no seed, or two runs of one kind have the same
    seed.
    """
    finished = [run for run in reference if run.complete and np.isfinite(run.accuracy)]
    if not finished:
        raise ResultsError(
            "--reference: none of these runs is finished and evaluated; give finished dense runs"
        )
    of_seed = _by_seed(finished)
    flops = float(np.mean([run.total_flops for run in finished]))
    seconds = float(np.mean([run.total_seconds for run in finished]))
    methods: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        if run.complete and np.isfinite(run.accuracy):
            method, budget = _method(run)
            methods.setdefault(method, {}).setdefault(budget, []).append(run)
    told = [(flat(json.loads(method)), budgets) for method, budgets in methods.items()]
    measured = []
    for settings, budgets in told:
        points = []
        for of_budget in budgets.values():
            pairs = [(run, of_seed[seed]) for seed, run in _by_seed(of_budget).items() if seed in of_seed]
            differences = [100 * (run.accuracy - other.accuracy) for run, other in pairs]
            points.append(
                {
                    "compute": float(np.mean([run.total_flops for run in of_budget])) / flops,
                    "seconds": float(np.mean([run.total_seconds for run in of_budget])) / seconds,
                    "seeds": len(differences),
                    "difference": float(np.mean(differences)) if differences else float("nan"),
                    "bound": lower_bound(differences),
                }
            )
        points.sort(key=lambda point: point["compute"])
        label = telling(settings, [other for other, _ in told]) or f"planner={settings.get('plan.planner')}"
        enough = {cost: _least(points, cost, margin) for cost in ("compute", "seconds")}
        measured.append({"label": label, "budgets": points, **enough})
    return {"margin": margin, "methods": measured}


def _by_seed(runs: Sequence[Run]) -> dict[int, Run]:
    """Runs by seed. Raises ResultsError for a second run of a seed, which would count as an independent one."""
    found: dict[int, Run] = {}
    for run in runs:
        if run.seed is None:
            raise ResultsError(
                f"{run.path}: its configuration, and so its seed, is not recorded: leave it out"
            )
        other = found.setdefault(run.seed, run)
        if other is not run:
            raise ResultsError(
                f"{run.path}: seed {run.seed} is that of {other.path}, too: leave one of them out"
            )
    return found


def _method(run: Run) -> tuple[str, str]:
    """Configuration without seed and budgets, and the budgets, as JSON."""
    settings, budgets = run.method, {}
    dense = run.setting("plan.planner") == "dense"
    for section, keys in _BUDGETS.items():
        if not dense and section != "plan":
            continue
        own = dict(settings.get(section, {}))
        budgets.update({key: own.pop(key, None) for key in keys})
        settings[section] = own
    return as_key(settings), as_key(budgets)


def lower_bound(differences: Sequence[float]) -> float:
    """The one-sided 95 % lower bound of the mean by Student's t; NaN for fewer than two differences."""
    from scipy import stats

    if len(differences) < 2:
        return float("nan")
    several = len(differences)
    error = float(np.std(differences, ddof=1)) / several**0.5
    return float(np.mean(differences) - stats.t.ppf(0.95, several - 1) * error)


def _least(points: Sequence[dict[str, Any]], cost: str, margin: float) -> float | None:
    """The least cost that is enough: from the largest budget down to the last whose bound holds, and from there along
    a line towards the first whose bound does not."""
    known = [point for point in points if np.isfinite(point["bound"])]
    least = None
    for point in reversed(known):
        if point["bound"] >= -margin:
            least = point
            continue
        if least is not None:
            share = (least["bound"] + margin) / (least["bound"] - point["bound"])
            return float(least[cost] + share * (point[cost] - least[cost]))
        return None
    return None if least is None else float(least[cost])


def sentences(numbers: dict[str, Any]) -> list[str]:
    """A line for each method."""
    lines, points = [], f"{numbers['margin']:g} points of top-1"
    for method in numbers["methods"]:
        if method["compute"] is not None:
            text = (
                f"{method['compute']:.2f} of the reference's compute and {method['seconds']:.2f} of its time are "
                f"enough to lose no more than {points}"
            )
        elif any(np.isfinite(point["bound"]) for point in method["budgets"]):
            text = f"may lose more than {points} at every budget that was run"
        else:
            text = f"not known whether it loses more than {points}: run two seeds that the reference has, too"
        lines.append(f"{method['label']}: {text}")
    return lines


def table(numbers: dict[str, Any]) -> list[list[str]]:
    """A heading row and a row for each budget, as text."""
    rows = [["method", "compute", "seconds", "seeds", "points from the reference", "at least (95 %)"]]
    for method in numbers["methods"]:
        for point in method["budgets"]:
            rows.append(
                [
                    method["label"],
                    number(point["compute"], ".3f"),
                    number(point["seconds"], ".3f"),
                    str(point["seeds"]),
                    number(point["difference"], "+.2f"),
                    number(point["bound"], "+.2f"),
                ]
            )
    return rows


def draw(numbers: dict[str, Any]) -> Figure:
    """Mean differences over compute and over seconds, each with its bound below; the margin as a line."""
    figure = new_figure(12, 5)
    for axis, cost in zip(figure.subplots(1, 2, sharey=True), ("compute", "seconds"), strict=True):
        for place, method in enumerate(numbers["methods"]):
            points, colour = method["budgets"], COLOURS[place % len(COLOURS)]
            spent = [point[cost] for point in points]
            means = [point["difference"] for point in points]
            down = [max(mean - point["bound"], 0) for mean, point in zip(means, points, strict=True)]
            axis.plot(spent, means, "o-", color=colour, label=short(method["label"]))
            bars = [np.nan_to_num(down), np.zeros(len(points))]
            axis.errorbar(spent, means, bars, fmt="none", color=colour, capsize=4)
        axis.axhline(-numbers["margin"], color="black", linestyle="--", linewidth=1, label="margin")
        axis.axhline(0, color="black", linewidth=1)
        axis.set(xlabel=f"{cost} (of the reference)")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("top-1, points from the reference")
    figure.suptitle("How little is enough (bars: down to the lower one-sided 95 % bound, paired by seed)")
    legend_below(figure)
    return figure
