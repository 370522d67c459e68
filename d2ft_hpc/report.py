"""The end-of-job report: a table of what runs cost and what they reached, and one picture of it."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d2ft_hpc.errors import ResultsError
from d2ft_hpc.results import open_run
from d2ft_hpc.results.reader import number, slowest
from d2ft_hpc.results.schema import Array, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FULL = 2
_MB = 1e6
# Okabe and Ito's palette: told apart with every kind of colour vision.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class RunSummary:
    """What the report says about one run. Shares are fractions; what was not recorded is NaN.

    Attributes:
        name: the run folder's name, longer where two runs would have the same.
        path: its HDF5 file.
        complete: whether the run ended in order.
        accuracy: top-1 of the last evaluation.
        planned_compute, measured_compute: FLOPs planned and executed over those of the dense model.
        train_seconds: sum over steps of the slowest rank's time.
        preparation_seconds: scoring and planning.
        bytes_per_rank_step, bytes_total: sent to other ranks.
        workload_variance: variance over ranks of executed over dense FLOPs.
        steps, loss: of every step, [step].
        evaluation_seconds: measured time to every evaluation, scoring and planning included, [evaluation].
        evaluation_accuracy: top-1 of every evaluation, [evaluation].
        full_share: share of rows (over all steps) that run FULL, [block, head]; None without plans.
    """

    name: str
    path: Path
    complete: bool
    accuracy: float
    planned_compute: float
    measured_compute: float
    train_seconds: float
    preparation_seconds: float
    bytes_per_rank_step: float
    bytes_total: float
    workload_variance: float
    steps: Array
    loss: Array
    evaluation_seconds: Array
    evaluation_accuracy: Array
    full_share: Array | None


def report(run_paths: Sequence[Path], png: Path | None) -> str:
    """Compare runs; the first is the one that times are relative to.

    Args:
        run_paths: results files or run folders.
        png: where to write the picture, None for no picture.

    Returns:
        The table as plain text.

    Raises:
        ResultsError: a run cannot be read, or the picture cannot be written.
    """
    if not run_paths:
        raise ResultsError("no runs to report on: give at least one results file or run folder")
    runs = [
        summarize(Path(path), name) for path, name in zip(run_paths, _distinct_names(run_paths), strict=True)
    ]
    if png is not None:
        _draw(runs, Path(png))
    return _table(runs)


def summarize(path: Path, name: str) -> RunSummary:
    """Read one run (a results file or run folder) and compute what the report shows.

    Raises:
        ResultsError: the run cannot be read.
    """
    with open_run(path) as run:
        steps = run.table("steps")
        evaluations = run.table("evaluations")
        plans = run.groups("plans")
        preparation = [number(attributes, "solve_seconds") for _, attributes in plans]
        preparation += [number(attributes, "seconds") for _, attributes in run.groups("scores")]
        dense, executed, sent = steps["dense_flops"], steps["executed_flops"], steps["bytes_sent"]
        evaluated = np.flatnonzero(np.isfinite(evaluations["accuracy"]))
        return RunSummary(
            name=name,
            path=run.path,
            complete=run.complete,
            accuracy=float(evaluations["accuracy"][evaluated[-1]]) if evaluated.size else math.nan,
            planned_compute=_share(steps["planned_flops"], dense),
            measured_compute=_share(executed, dense),
            train_seconds=float(slowest(steps["step_seconds"]).sum()),
            preparation_seconds=float(np.nansum(preparation)),
            bytes_per_rank_step=float(np.nanmean(sent)) if np.isfinite(sent).any() else math.nan,
            bytes_total=float(np.nansum(sent)) if np.isfinite(sent).any() else math.nan,
            workload_variance=float(
                np.var([_share(executed[:, r], dense[:, r]) for r in range(dense.shape[1])])
            )
            if dense.shape[1] > 1
            else math.nan,
            steps=steps["step"],
            loss=steps["loss"],
            evaluation_seconds=run.elapsed_seconds(evaluations["step"][evaluated]),
            evaluation_accuracy=evaluations["accuracy"][evaluated],
            full_share=_full_share(plans, steps["plan"]),
        )


def _share(part: Array, whole: Array) -> float:
    """Sum of `part` over sum of `whole` where both were recorded."""
    known = np.isfinite(part) & np.isfinite(whole)
    total = float(whole[known].sum())
    return float(part[known].sum()) / total if total > 0 else math.nan


def _full_share(plans: list[Group], used: Array) -> Array | None:
    """Mean over rows of FULL, over the plans weighted by the steps that ran them, [block, head]."""
    shares = [
        (np.asarray(data["operations"]) == _FULL).mean(axis=0) for data, _ in plans if "operations" in data
    ]
    indices = [attributes["index"] for data, attributes in plans if "operations" in data]
    if not shares or any(share.shape != shares[0].shape for share in shares):
        return None
    weights = np.array([np.count_nonzero(used == index) for index in indices], dtype=np.float64)
    return np.asarray(np.average(shares, axis=0, weights=weights if weights.any() else None))


def _distinct_names(run_paths: Sequence[Path]) -> list[str]:
    folders = []
    for path in map(Path, run_paths):
        path = path.absolute()
        folders.append(
            path.parent if path.name == "results.h5" else path.with_name(path.name.removesuffix(".h5"))
        )
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        common = os.path.commonpath(folders)
        names = [os.path.relpath(folder, common) for folder in folders]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _table(runs: list[RunSummary]) -> str:
    first = runs[0]
    rows = [
        ("", "top-1", "planned", "measured", "train", "time", "sent per", "sent", "workload", "scoring,"),
        ("", "", "compute", "compute", "time", "relative", "rank-step", "total", "variance", "planning"),
        ("run", "%", "% of dense", "% of dense", "s", "to first", "MB", "MB", "over ranks", "s"),
    ]
    for run in runs:
        rows.append(
            (
                _short(run.name),
                _number(100 * run.accuracy, ".2f"),
                _number(100 * run.planned_compute, ".1f"),
                _number(100 * run.measured_compute, ".1f"),
                _number(run.train_seconds, ".1f"),
                _number(_ratio(run.train_seconds, first.train_seconds), ".3f"),
                _number(run.bytes_per_rank_step / _MB, ".3f"),
                _number(run.bytes_total / _MB, ".1f"),
                _number(run.workload_variance, ".2e"),
                _number(run.preparation_seconds, ".2f"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    head, body = lines[:3], lines[3:]
    rule = "-" * max(map(len, lines))
    for i, run in enumerate(runs):
        body[i] += f"\n    {run.path}" + ("" if run.complete else "  (did not end in order)")
    return "\n".join([*head, rule, *body])


def _draw(runs: list[RunSummary], png: Path) -> None:
    from matplotlib.figure import Figure  # slow to import; without pyplot no display is ever opened

    figure = Figure(figsize=(13, 9.5), layout="constrained")
    axes = figure.subplots(2, 2)
    styles: list[dict[str, Any]] = [
        {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _LINES[(i // len(_COLOURS)) % len(_LINES)]}
        for i in range(len(runs))
    ]
    for run, style in zip(runs, styles, strict=True):
        _draw_loss(axes[0, 0], run, style)
        axes[0, 1].plot(
            run.evaluation_seconds, 100 * run.evaluation_accuracy, marker="o", label=_short(run.name), **style
        )
    axes[0, 0].set(title="Training loss (smoothed)", xlabel="optimizer step", ylabel="loss")
    axes[0, 1].set(
        title="Accuracy against measured time",
        xlabel="training, scoring and planning time (s)",
        ylabel="top-1 accuracy (%)",
    )
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        if any(line.get_xdata().size for line in axis.get_lines()):
            axis.legend(fontsize="small")
        else:
            _say(axis, "nothing recorded")
    _draw_plan(axes[1, 0], runs)
    _draw_bars(axes[1, 1], runs)
    try:
        png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, dpi=120, format="png")
    except OSError as fault:
        raise ResultsError(
            f"cannot write the picture {png}: {os.strerror(fault.errno or 0)}; "
            "choose a folder with free space that this user can write to"
        ) from fault


def _short(name: str, length: int = 28) -> str:
    return name if len(name) <= length else f"{name[: length // 2 - 2]}...{name[-length // 2 + 1 :]}"


def _say(axis: "Axes", text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color="0.4")


def _draw_loss(axis: "Axes", run: RunSummary, style: dict[str, Any]) -> None:
    known = np.isfinite(run.loss)
    steps, loss = run.steps[known], run.loss[known]
    window = max(1, len(loss) // 30)
    if window > 1:
        axis.plot(steps, loss, alpha=0.2, linewidth=0.7, **style)
    smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid") if len(loss) else loss
    axis.plot(steps[window // 2 :][: len(smooth)], smooth, label=_short(run.name), **style)


def _draw_plan(axis: "Axes", runs: list[RunSummary]) -> None:
    sparse = [run for run in runs if run.full_share is not None and run.full_share.min() < 1]
    from matplotlib.ticker import MaxNLocator

    if not sparse or sparse[-1].full_share is None:
        axis.set_axis_off()
        axis.set_title("Plan")
        _say(axis, "every run is dense: all subnets FULL")
        return
    run, share = sparse[-1], sparse[-1].full_share
    image = axis.imshow(100 * share, vmin=0, vmax=100, cmap="cividis", aspect="auto", origin="lower")
    axis.set(title=f"Plan of {_short(run.name)}", xlabel="head", ylabel="block")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.figure.colorbar(image, ax=axis, label="rows (micro-batches) run FULL (%)")


def _draw_bars(axis: "Axes", runs: list[RunSummary]) -> None:
    first = runs[0]
    place = np.arange(len(runs))
    preparation = [100 * _ratio(run.preparation_seconds, first.train_seconds) for run in runs]
    bars = {
        "planned compute (% of dense)": [100 * run.planned_compute for run in runs],
        "measured compute (% of dense)": [100 * run.measured_compute for run in runs],
        f"train time (% of {_short(first.name)})": [
            100 * _ratio(run.train_seconds, first.train_seconds) for run in runs
        ],
    }
    for i, (label, values) in enumerate(bars.items()):
        drawn = axis.bar(place + 0.27 * (i - 1), np.nan_to_num(values), 0.25, label=label, color=_COLOURS[i])
        inside = [_number(value, ".0f") for value in values]
        if len(runs) <= 6:
            ink = "black" if i == 1 else "white"
            axis.bar_label(drawn, inside, label_type="center", fontsize="small", color=ink)
    if np.nansum(preparation) > 0:
        axis.bar(
            place + 0.27,
            np.nan_to_num(preparation),
            0.25,
            bottom=np.nan_to_num(bars[label]),
            label="scoring and planning time",
            color="white",
            edgecolor=_COLOURS[2],
            hatch="////",
        )
    names = [_short(run.name, 18) for run in runs]
    crowded = len(runs) > 4 or max(map(len, names)) * len(runs) > 60
    axis.set_xticks(place, names, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axis.set(title="Compute and time", ylabel="%")
    axis.set_ylim(0, 1.08 * max(axis.dataLim.y1, 1))
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(
        fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12 if not crowded else -0.3), ncols=2
    )
