"""Compares configurations over seeds, with the significance of their differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from d2ft_hpc.figures.run import Run, as_key
from d2ft_hpc.figures.style import (
    COLOURS,
    Figure,
    end_at_100,
    legend_below,
    name_ticks,
    new_figure,
    number,
    short,
)

_METRICS = {
    "accuracy": ("top-1 accuracy (%)", 100.0),
    "seconds": ("training, scoring and planning time (s)", 1.0),
    "compute": ("executed compute, scoring included (PFLOP)", 1e-15),
}
_PROPERTIES = {"accuracy": "accuracy", "seconds": "total_seconds", "compute": "total_flops"}


def measure(runs: Sequence[Run]) -> dict[str, Any]:
    """Groups of runs. Those of a group ran on equally many ranks, and their configurations differ in nothing but the
    `run` section; the first group is the reference. For each metric: values, mean, standard deviation and half the 95
    % interval of the mean; against the reference, the difference, half its 95 % interval, and the p-value,
    Holm-corrected over the groups. `test` says which t-test that is: "paired", of the differences between runs of one
    seed, where both groups have the same seeds, once each; else "Welch". What a single run cannot tell is NaN. Runs
    that did not end in order are left out, unless there are no others.
    """
    groups: dict[str, list[Run]] = {}
    for run in [run for run in runs if run.complete] or runs:
        groups.setdefault(as_key(run.method), []).append(run)
    configs = [flat(members[0].method) for members in groups.values()]
    measured = [
        {
            "label": telling(config, configs) or members[0].name,
            "runs": [run.name for run in members],
            "seeds": [run.seed for run in members],
            **{
                metric: _spread([getattr(run, _PROPERTIES[metric]) for run in members]) for metric in _METRICS
            },
        }
        for config, members in zip(configs, groups.values(), strict=True)
    ]
    for metric in _METRICS:
        _test(measured, metric)
    return {"groups": measured}


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def telling(config: dict[str, Any], all_configs: Sequence[dict[str, Any]]) -> str:
    """The settings, by dotted keys, that distinguish a configuration from the others; empty if there are none."""
    differing = [
        key for key in config if any(other.get(key, config[key]) != config[key] for other in all_configs)
    ]
    return ", ".join(f"{key.rsplit('.', 1)[-1]}={config[key]}" for key in differing)


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
    tested = []
    for group in groups[1:]:
        group["test"] = "paired" if _same_seeds(group, groups[0]) else "Welch"
        spread = group[metric]
        spread |= _difference(group, groups[0], metric, paired=group["test"] == "paired")
        if np.isfinite(spread["p"]):
            tested.append(spread)
    largest = 0.0
    for rank, spread in enumerate(sorted(tested, key=lambda each: each["p"])):
        largest = max(largest, min(1.0, spread["p"] * (len(tested) - rank)))
        spread["p"] = largest


def _same_seeds(one: dict[str, Any], other: dict[str, Any]) -> bool:
    seeds = one["seeds"]
    return None not in seeds and len(set(seeds)) == len(seeds) and set(seeds) == set(other["seeds"])


def _difference(
    group: dict[str, Any], reference: dict[str, Any], metric: str, *, paired: bool
) -> dict[str, float]:
    from scipy import stats

    def by_seed(each: dict[str, Any]) -> Any:
        order = np.argsort(each["seeds"]) if paired else slice(None)
        return np.asarray(each[metric]["values"], dtype=float)[order]

    own, other = by_seed(group), by_seed(reference)
    found = {
        "difference": group[metric]["mean"] - reference[metric]["mean"],
        "difference_half_interval": float("nan"),
        "p": float("nan"),
    }
    spread = (own - other).std() if paired else min(own.std(), other.std())
    if min(len(own), len(other)) > 1 and spread > 0:  # not NaN either
        test = stats.ttest_rel(own, other) if paired else stats.ttest_ind(own, other, equal_var=False)
        interval = test.confidence_interval(0.95)
        found["p"] = float(test.pvalue)
        found["difference_half_interval"] = float(interval.high - interval.low) / 2
    return found


def table(numbers: dict[str, Any]) -> list[list[str]]:
    """A heading row and a row for each group and metric, as text."""
    rows = [["runs", "n", "", "mean", "difference from the first", "p (Holm)", "t-test"]]
    for group in numbers["groups"]:
        for metric, (label, factor) in _METRICS.items():
            spread = group[metric]
            rows.append(
                [
                    group["label"],
                    str(len(group["runs"])),
                    label,
                    _plus_minus(factor * spread["mean"], factor * spread["half_interval"]),
                    _plus_minus(
                        factor * spread["difference"], factor * spread["difference_half_interval"], "+"
                    )
                    if "difference" in spread
                    else "-",
                    number(spread.get("p"), ".2g"),
                    group.get("test", "-"),
                ]
            )
    return rows


def _plus_minus(value: float, half_interval: float, sign: str = "") -> str:
    text = number(value, f"{sign}.4g")
    return f"{text} ± {half_interval:.2g}" if np.isfinite(half_interval) else text


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
                label="mean and its 95 % interval" if np.isfinite(half) else "mean",
            )
        names = [
            f"{_wrapped(group['label'], 60 // len(groups))}\nn={len(group['runs'])}"
            + (
                f", p={group[metric]['p']:.2g} ({group['test']})"
                if np.isfinite(group[metric].get("p", np.nan))
                else ""
            )
            for group in groups
        ]
        if len(groups) <= 4:
            axis.set_xticks(range(len(groups)), names, fontsize="small")
        else:
            name_ticks(axis, [group["label"] for group in groups])
        axis.set(ylabel=label, xlim=(-0.6, len(groups) - 0.4))
        axis.grid(axis="y", alpha=0.3)
        axis.margins(y=0.15)
        if metric == "accuracy":
            end_at_100(axis)
    legend_below(figure)
    figure.suptitle(
        "Runs over seeds (p: t-test against the first, paired by seed or Welch's, Holm-corrected)"
    )
    return figure


def _wrapped(label: str, width: int) -> str:
    return "\n".join(short(part.strip(), width) for part in label.split(",")[:4])
