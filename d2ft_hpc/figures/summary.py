"""What runs cost and what they reached: a table, and compute and time side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from d2ft_hpc.figures.run import Run, share, total
from d2ft_hpc.figures.style import COLOURS, Figure, name_ticks, new_figure, number, short
from d2ft_hpc.planning.communication_volume import reduces_trained_blocks_only
from d2ft_hpc.safe_text import one_line

_MB = 1e6
_SHOWN_VALUES = 4
"""Of each setting in which runs differ."""
_OF_ACCURACY = ("model.weights", "data.root")
"""Settings that decide accuracy, but no times."""
_COLUMNS: tuple[tuple[tuple[str, str, str], str, float, str], ...] = (
    (("top-1", "", "%"), "accuracy", 100, ".2f"),
    (("planned", "compute", "% of dense"), "planned_compute", 100, ".1f"),
    (("measured", "compute", "% of dense"), "measured_compute", 100, ".1f"),
    (("train", "time", "s"), "train_seconds", 1, ".1f"),
    (("time", "% of the", "first run"), "time_share", 100, ".1f"),
    (("sent per", "rank-step", "MB"), "bytes_per_rank_step", 1 / _MB, ".3f"),
    (("sent", "total", "MB"), "bytes_total", 1 / _MB, ".1f"),
    (("planned", "bytes", "% of dense"), "planned_bytes", 100, ".1f"),
    (("measured", "bytes", "% of dense"), "measured_bytes", 100, ".1f"),
    (("workload", "variance", "over ranks"), "workload_variance", 1, ".2e"),
    (("waiting", "for others", "% of time"), "waiting_share", 100, ".1f"),
    (("scoring,", "planning", "s"), "preparation_seconds", 1, ".2f"),
)
"""Of the table: the heading, which number it shows, times what, and in which format. Dense bytes are what the message
model says for the run's engine."""


def measure(runs: Sequence[Run], reference: Sequence[Run] = ()) -> dict[str, Any]:
    """The summary of each run, in order; the first is the one that times are relative to. Shares of dense compute and
    bytes are of a dense run of the same epochs, in all of their steps. reference: runs whose accuracy and time those
    are compared with, too."""
    return {
        "runs": [_summary(run) for run in runs],
        "compared": "times and accuracy" if reference else "times",
        "unlike": _unlike([*runs, *reference], _OF_ACCURACY if reference else ()),
    }


def _unlike(runs: Sequence[Run], further: Sequence[str]) -> dict[str, list[Any]]:
    """What decides times beside the plans, and the further settings, where not all runs that recorded it have the same:
    its values, once each."""
    conditions = [run.conditions | {key: run.setting(key) for key in further} for run in runs]
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for each in conditions for key in each):
        values: list[Any] = []
        for each in conditions:
            if key in each and each[key] not in values:
                values.append(each[key])
        if len(values) > 1:
            found[key] = values
    return found


def _summary(run: Run) -> dict[str, Any]:
    steps, of_ranks = run.steps, run.rank_compute
    sent, memory = steps["bytes_sent"], steps["memory_bytes"]
    of_steps = run.steps_share
    return {
        "name": run.name,
        "path": str(run.path),
        "complete": run.complete,
        "state": run.state,
        "accuracy": run.accuracy,
        "planned_compute": of_steps * run.planned_compute,
        "measured_compute": of_steps * run.measured_compute,
        "train_seconds": run.train_seconds,
        "preparation_seconds": run.preparation_seconds,
        "bytes_per_rank_step": float(np.nanmean(sent)) if np.isfinite(sent).any() else np.nan,
        "bytes_total": run.total_bytes,
        "planned_bytes": of_steps * share(steps["planned_bytes"], steps["dense_bytes"]),
        "measured_bytes": of_steps * share(sent, steps["dense_bytes"]),
        "workload_variance": float(np.var(of_ranks)) if len(of_ranks) > 1 else np.nan,
        "waiting_share": share(steps["waiting_seconds"], steps["step_seconds"]),
        "recording_share": share(steps["recording_seconds"], steps["step_seconds"]),
        "memory_bytes": float(np.nanmax(memory)) if np.isfinite(memory).any() else np.nan,
        "steps_share": of_steps,
        "recomputes": run.recomputes,
        "between_replicas": _between_replicas(run),
    }


_RECOMPUTES = (
    "measured compute has the activations that are recomputed (activation checkpointing), which planned and dense "
    "compute do not have"
)
_NAMES = {"ddp": "DDP", "zero0": "DeepSpeed in bf16", "zero1": "ZeRO 1", "zero2": "ZeRO 2", "zero3": "ZeRO 3"}


def _between_replicas(run: Run) -> str:
    """How a plan changes the bytes between a run's replicas; empty where one line cannot say it."""
    if run.engine is None or run.replicas == 1 or run.is_dense:
        return ""
    kind = run.engine.data_parallel
    if kind == "fsdp2":
        dense = total(run.steps["dense_bytes"])
        saved = dense - run.total_bytes
        if saved < 0.0005 * dense:
            return "the plan changes no bytes between replicas: FSDP2 gathered every block"
        less = f"{number(saved / _MB, '.1f')} MB less than dense"
        return f"sent {less}: FSDP2 does not gather a block that no replica runs"
    if reduces_trained_blocks_only(kind, run.engine.precision):
        return ""
    more = "; in its first step, which learns their order, it gathers weights more often" * (kind == "zero3")
    return f"the plan changes no bytes between replicas: {_NAMES[kind]} reduces every gradient{more}"


def table(numbers: dict[str, Any]) -> list[list[str]]:
    """Three heading rows and a row for each run, as text."""
    first = numbers["runs"][0]
    rows = [list(row) for row in zip(("", "", "run"), *(head for head, *_ in _COLUMNS), strict=True)]
    for run in numbers["runs"]:
        values = run | {"time_share": _ratio(run["train_seconds"], first["train_seconds"])}
        cells = [number(factor * values[name], form) for _, name, factor, form in _COLUMNS]
        rows.append([short(run["name"]), *cells])
    return rows


def notes(numbers: dict[str, Any]) -> list[str]:
    """What to know beside the table: what makes what is compared unlike, and of each run what is its own."""
    remarks = (
        (run["name"], text)
        for run in numbers["runs"]
        for text in (_fewer_steps(run), _RECOMPUTES * run["recomputes"], run["between_replicas"])
    )
    told = [f"{name}: {text}" for name, text in remarks if text]
    if unlike := numbers["unlike"]:
        differ = ", ".join(f"{key} ({_some(values)})" for key, values in unlike.items())
        told.insert(
            0, f"{numbers['compared']} are of unlike runs, which differ not only in their plans: {differ}"
        )
    return told


def _some(values: Sequence[Any]) -> str:
    return ", ".join(
        [short(one_line(str(value))) for value in values[:_SHOWN_VALUES]]
        + ["..."] * (len(values) > _SHOWN_VALUES)
    )


def _fewer_steps(run: dict[str, Any]) -> str:
    share = run["steps_share"]
    if not share < 1:
        return ""
    percent = number(100 * share, ".1f")
    return f"takes {percent} % of its epochs' steps (train.steps_share); % of dense is of all of them"


def as_text(numbers: dict[str, Any]) -> str:
    """The table for a terminal, with the path of each run, and notes."""
    rows = [[one_line(cell) for cell in row] for row in table(numbers)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    head, body = lines[:3], lines[3:]
    rule = "-" * max(map(len, lines))
    for i, run in enumerate(numbers["runs"]):
        body[i] += f"\n    {one_line(run['path'])}" + (f"  ({run['state']})" if run["state"] else "")
    return "\n".join([*head, rule, *body, *notes(numbers)])


def draw(numbers: dict[str, Any]) -> Figure:
    """Bars of planned compute, measured compute and time."""
    runs = numbers["runs"]
    first = runs[0]["train_seconds"]
    figure = new_figure(max(7, 2 + 1.2 * len(runs)), 5)
    axis = figure.subplots()
    place = np.arange(len(runs))
    time_label = f"training time (% of {short(runs[0]['name'])})"
    bars = {
        "planned compute (% of dense)": [100 * run["planned_compute"] for run in runs],
        "measured compute (% of dense)": [100 * run["measured_compute"] for run in runs],
        time_label: [100 * _ratio(run["train_seconds"], first) for run in runs],
    }
    for i, (label, values) in enumerate(bars.items()):
        drawn = axis.bar(place + 0.27 * (i - 1), np.nan_to_num(values), 0.25, label=label, color=COLOURS[i])
        if len(runs) <= 8:
            ink = "black" if i == 1 else "white"
            texts = [number(value, ".0f") for value in values]
            axis.bar_label(drawn, texts, label_type="center", fontsize="small", color=ink)
    preparation = [100 * _ratio(run["preparation_seconds"], first) for run in runs]
    if np.nansum(preparation) > 0:
        axis.bar(
            place + 0.27,
            np.nan_to_num(preparation),
            0.25,
            bottom=np.nan_to_num(bars[time_label]),
            label="scoring and planning time",
            color="white",
            edgecolor=COLOURS[2],
            hatch="////",
        )
    name_ticks(axis, [run["name"] for run in runs])
    axis.set(title="Compute and time", ylabel="%")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")
