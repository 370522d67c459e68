"""How much time plans lost because their shapes are too many for torch.compile, or for CUDA graphs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from d2ft_hpc.figures.run import Run
from d2ft_hpc.results.schema import Array


def measure(runs: Sequence[Run]) -> dict[str, Any]:
    """For each run with such plans: how many shapes, and its time over the ideal one.

    The ideal is the dense time times the share of the FLOPs that the slowest rank executed, as medians over the steps
    under such plans. The dense time is that of the first dense run's steps. Without a dense run, it is that of the
    passes which the run timed at its start, and only forward and backward are compared. Without these it is not known
    (NaN).
    """
    dense = next((run for run in runs if run.is_dense), None)
    return {"runs": [found for run in runs if (found := _of_run(run, dense)) is not None]}


def _of_run(run: Run, dense: Run | None) -> dict[str, Any] | None:
    plans = run.plans
    most = plans["most_shapes"]
    shapes = {"block_shapes": plans["block_shapes"]}
    if run.results.attributes("environment").get("device", "cpu") != "cpu":
        shapes["micro_batch_shapes"] = plans["micro_batch_shapes"]
    is_free = np.any([(most >= 0) & (counts > most) for counts in shapes.values()], axis=0)
    chosen = np.isin(run.steps["plan"], np.flatnonzero(is_free))
    if not chosen.any():
        return None
    seconds, dense_seconds = run.busy_seconds, float("nan")
    if dense is not None:
        dense_seconds = float(np.median(dense.per_dense_flop(dense.busy_seconds)))
    elif (passes := _seconds_of_dense_passes(run)) > 0:
        seconds, dense_seconds = run.steps["forward_seconds"] + run.steps["backward_seconds"], passes
    executed, flops = run.steps["executed_flops"], run.steps["dense_flops"]
    share = np.fmax.reduce(executed / np.where(flops > 0, flops, np.nan), axis=1, initial=np.nan)
    ratio = run.per_dense_flop(seconds) / (share * dense_seconds)
    return {
        "name": run.name,
        **{name: int(counts[is_free].max()) for name, counts in shapes.items()},
        "most_shapes": int(most[is_free].max()),
        "dense": None if dense is None else dense.name,
        "executed_share": _median(share[chosen]),
        "seconds_over_ideal": _median(ratio[chosen]),
    }


def _seconds_of_dense_passes(run: Run) -> float:
    """Seconds for each FLOP of the dense passes that the run timed at its start; NaN if not known."""
    model = run.results.attributes("model")
    samples = run.setting("data.micro_batch_size")
    names = ("dense_pass_seconds", "always_flops", "full_flops", "num_blocks", "num_heads")
    if not samples or any(name not in model for name in names):
        return float("nan")
    seconds, always, full, blocks, heads = (float(model[name]) for name in names)
    blocks -= len(re.findall(r"\d+", str(model.get("frozen_blocks", "[]"))))
    return seconds / (float(samples) * (always + blocks * heads * full))


def _median(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else float("nan")


def sentences(numbers: dict[str, Any]) -> list[str]:
    """One or two for each run."""
    return [f"{run['name']}: {_why(run)}. {_loss(run)}." for run in numbers["runs"]]


def _why(run: dict[str, Any]) -> str:
    most, parts = run["most_shapes"], []
    for shapes, what, key in (
        ("block_shapes", "blocks that skip heads ran eagerly", "compile"),
        ("micro_batch_shapes", "micro-batches ran without CUDA graphs", "cuda_graphs"),
    ):
        if (count := run.get(shapes, 0)) > most:
            parts.append(f"{what}; their {count} shapes are too many for engine.{key} (at most {most})")
    return ", and ".join(parts)


def _loss(run: dict[str, Any]) -> str:
    ratio = run["seconds_over_ideal"]
    if not np.isfinite(ratio):
        return "What that cost is not known: there is no dense time to compare with"
    what, of = "A step", f"the step of {run['dense']}"
    if run["dense"] is None:
        what, of = "Forward and backward", "the dense passes that it timed at its start"
    return f"{what} took {ratio:.2f} times the ideal, {run['executed_share']:.1%} of {of}"
