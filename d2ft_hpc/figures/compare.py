"""Configurations against each other over seeds, with the significance of the differences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from d2ft_hpc.figures.run import Run
from d2ft_hpc.figures.style import COLOURS, name_ticks, new_figure, number, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METRICS = {
    "accuracy": ("top-1 accuracy (%)", 100.0),
    "seconds": ("training, scoring and planning time (s)", 1.0),
    "compute": ("executed compute, scoring included (PFLOP)", 1e-15),
}


def measure(runs: Sequence[Run]) -> dict[str, Any]:
    """Groups of runs whose configurations differ in nothing but the `run` section, the first being the reference.

    Of each metric: values, mean, standard deviation, half the 95 % interval of the mean, and against the reference
    the difference and the p-value of Welch's t-test, Holm-corrected over the groups. What one run cannot say is NaN.
    Runs that did not end in order are left out, unless there are no others.
    """
    groups: dict[str, list[Run]] = {}
    for run in [run for run in runs if run.complete] or runs:
        settings = {key: value for key, value in (run.config or {}).items() if key != "run"}
        groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(run)
    configs = [_flat(members[0].config or {}) for members in groups.values()]
    measured = [
        {
            "label": _label(config, configs, members),
            "runs": [run.name for run in members],
            "seeds": [config_seed(run) for run in members],
            **{metric: _spread([_value(run, metric) for run in members]) for metric in _METRICS},
        }
        for config, members in zip(configs, groups.values(), strict=True)
    ]
    for metric in _METRICS:
        _test(measured, metric)
    return {"groups": measured}


def config_seed(run: Run) -> int | None:
    """The seed of a run, None if its configuration was not stored."""
    seed = (run.config or {}).get("run", {}).get("seed")
    return None if seed is None else int(seed)


def _value(run: Run, metric: str) -> float:
    return {
        "accuracy": run.accuracy,
        "seconds": run.train_seconds + run.preparation_seconds,
        "compute": run.total_flops,
    }[metric]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if not prefix and key == "run":
            continue
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _label(config: dict[str, Any], all_configs: list[dict[str, Any]], members: list[Run]) -> str:
    """What tells a configuration from the others."""
    if not config:
        return members[0].name
    differing = [
        key for key in config if any(other.get(key, config[key]) != config[key] for other in all_configs)
    ]
    return ", ".join(f"{key.rsplit('.', 1)[-1]}={config[key]}" for key in differing) or members[0].name


def _spread(values: list[float]) -> dict[str, Any]:
    from scipy import stats

    known = np.array([value for value in values if np.isfinite(value)])
    several = len(known) > 1
    deviation = float(known.std(ddof=1)) if several else float("nan")
    width = float(stats.t.ppf(0.975, len(known) - 1)) if several else float("nan")
    return {
        "values": values,
        "mean": float(known.mean()) if len(known) else float("nan"),
        "deviation": deviation,
        "half_interval": width * deviation / len(known) ** 0.5 if several else float("nan"),
    }


def _test(groups: list[dict[str, Any]], metric: str) -> None:
    """Adds differences from the first group and their corrected p-values."""
    from scipy import stats

    reference = groups[0][metric]
    tested = []
    for group in groups[1:]:
        other = group[metric]
        other["difference"] = other["mean"] - reference["mean"]
        other["p"] = float("nan")
        if all(spread["deviation"] > 0 for spread in (reference, other)):
            other["p"] = float(stats.ttest_ind(other["values"], reference["values"], equal_var=False).pvalue)
            tested.append(other)
    largest = 0.0
    for rank, other in enumerate(sorted(tested, key=lambda each: each["p"])):
        largest = max(largest, min(1.0, other["p"] * (len(tested) - rank)))
        other["p"] = largest


def draw(numbers: dict[str, Any]) -> Figure:
    """A panel for each metric: every run, and the mean with its 95 % interval."""
    groups = numbers["groups"]
    figure = new_figure(max(12, 2 + 4 * len(groups)), 5.4)
    for axis, (metric, (label, factor)) in zip(
        figure.subplots(1, len(_METRICS)), _METRICS.items(), strict=True
    ):
        for place, group in enumerate(groups):
            spread = group[metric]
            values = factor * np.asarray(spread["values"], dtype=float)
            aside = place - 0.12
            axis.plot(
                [aside] * len(values),
                values,
                "o",
                color=COLOURS[place % len(COLOURS)],
                alpha=0.6,
                label="one run" if place == 0 else None,
            )
            half = spread["half_interval"]
            axis.errorbar(
                [place + 0.12],
                [factor * spread["mean"]],
                [factor * half] if np.isfinite(half) else None,
                fmt="D",
                color="black",
                capsize=5,
                label="mean and its 95 % interval" if place == 0 else None,
            )
        names = [
            f"{_wrapped(group['label'])}\nn={len(group['runs'])}"
            + (f", p={number(group[metric]['p'], '.2g')}" if "p" in group[metric] else "")
            for group in groups
        ]
        if len(groups) <= 4:
            axis.set_xticks(range(len(groups)), names, fontsize="small")
        else:
            name_ticks(axis, [group["label"] for group in groups])
        axis.set(ylabel=label, xlim=(-0.6, len(groups) - 0.4))
        axis.grid(axis="y", alpha=0.3)
        axis.margins(y=0.15)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    figure.suptitle("Runs over seeds (p: Welch's t-test against the first, Holm-corrected)")
    return figure


def _wrapped(label: str) -> str:
    return "\n".join(short(part.strip(), 15) for part in label.split(",")[:4])
