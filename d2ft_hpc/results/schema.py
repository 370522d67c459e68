"""What a results file holds (schema version 1).

Root attributes: `format` ("d2ft-hpc results"), `schema_version`, `created` (UTC, ISO 8601),
`package_version`, `complete` (true once the run ended in order) and, only while the run goes on, `segments`
(the names of the segment files, oldest first, separated by spaces).

Static groups, written once. Each dataset in them is listed in `GROUPS`; attributes are free, scalar, and
carry their unit in their name:

    config         yaml: the resolved configuration
    environment    attributes: library versions, launcher, world_size, replicas, device, ...
    model          attributes: name, num_blocks, num_heads, ...
    scores/<k>     forward, backward; attributes: step, forward_name, backward_name, seconds
    plans/<k>      operations; attributes: hash, planner, replicas, objective, bound, gap, status,
                   solve_seconds, first_step, planned_compute (share of dense FLOPs)

Tables, one dataset a column, all columns of a table equally long, one row a record (`TABLES`). Columns with a
rank axis are [row, rank], the others [row]. What a row did not give is NaN (floats), -1 (integers) or ""
(text).

Every dataset has the attributes `units` ("1" for pure numbers) and `description`.

All texts, in attributes too, are UTF-8 of fixed length. HDF5 keeps texts of variable length in its global
heap, the one structure without a checksum, where a few damaged bytes can send the library into an endless
loop.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FORMAT = "d2ft-hpc results"
SCHEMA_VERSION = 1

Array = NDArray[Any]
Scalar = str | bool | int | float
Group = tuple[dict[str, Array | str], dict[str, Scalar]]
"""A static group: its datasets and its attributes."""

Kind = Literal["text", "int64", "uint8", "float32", "float64"]
MISSING: dict[Kind, str | int | float] = {
    "text": "",
    "int64": -1,
    "uint8": 0,
    "float32": np.nan,
    "float64": np.nan,
}


@dataclass(frozen=True)
class Field:
    """One dataset: a column of a table, or an array in a static group.

    `axes` names the axes of one value: none for a single number or text, "rank" for per-rank columns.
    """

    name: str
    kind: Kind
    units: str
    description: str
    axes: tuple[str, ...] = ()


def _fields(*fields: Field) -> dict[str, Field]:
    return {field.name: field for field in fields}


def _of_ranks(name: str, units: str, description: str) -> Field:
    return Field(name, "float64", units, description, ("rank",))


_PLAN_AXES = ("row", "block", "head")

GROUPS: dict[str, dict[str, Field]] = {
    "config": _fields(Field("yaml", "text", "1", "resolved configuration of the run, YAML")),
    "environment": {},
    "model": {},
    "scores": _fields(
        Field("forward", "float32", "1", "forward contribution", _PLAN_AXES),
        Field("backward", "float32", "1", "backward contribution", _PLAN_AXES),
    ),
    "plans": _fields(
        Field("operations", "uint8", "1", "0 SHORTCUT, 1 FORWARD_ONLY, 2 FULL", _PLAN_AXES),
    ),
}
NUMBERED = ("scores", "plans")
"""The groups that hold numbered members: scores/0, scores/1, ..."""

TABLES: dict[str, dict[str, Field]] = {
    "steps": _fields(
        Field("step", "int64", "1", "optimizer step"),
        Field("epoch", "int64", "1", "epoch that the step belongs to"),
        Field("plan", "int64", "1", "index into plans, -1 for none"),
        Field("loss", "float64", "1", "training loss, mean over all samples of the step"),
        Field("learning_rate", "float64", "1", "learning rate of the step"),
        Field("gradient_norm", "float64", "1", "L2 norm of the gradient before clipping"),
        Field("samples", "int64", "1", "samples of the step over all ranks"),
        _of_ranks("dense_flops", "FLOP", "what the dense model would have computed"),
        _of_ranks("planned_flops", "FLOP", "what the plan asks for, always-run parts included"),
        _of_ranks("executed_flops", "FLOP", "what was computed"),
        _of_ranks("bytes_sent", "B", "bytes sent to other ranks"),
        _of_ranks("data_seconds", "s", "waiting for input"),
        _of_ranks("forward_seconds", "s", "forward pass"),
        _of_ranks("backward_seconds", "s", "backward pass"),
        _of_ranks("optimizer_seconds", "s", "optimizer step"),
        _of_ranks("step_seconds", "s", "the whole step"),
    ),
    "evaluations": _fields(
        Field("step", "int64", "1", "last optimizer step before the evaluation"),
        Field("epoch", "int64", "1", "epoch"),
        Field("accuracy", "float64", "1", "top-1 accuracy, 0 to 1"),
        Field("loss", "float64", "1", "mean loss"),
        Field("samples", "int64", "1", "samples evaluated"),
        Field("seconds", "float64", "s", "time the evaluation took"),
    ),
    "events": _fields(
        Field("step", "int64", "1", "last optimizer step before the event"),
        Field("time", "text", "1", "when, UTC, ISO 8601"),
        Field("kind", "text", "1", "plan, resume, checkpoint, error, ..."),
        Field("text", "text", "1", "what happened"),
        Field("seconds", "float64", "s", "time it took"),
    ),
}


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the most similar known one, or all of them."""
    known = sorted(known)
    match = get_close_matches(name, known, n=1)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(known) or 'none'}"
