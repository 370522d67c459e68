"""What a results file holds (schema version 2).

Root attributes: `format` ("d2ft-hpc results"), `schema_version`, `created` (UTC, ISO 8601), `package_version`,
`complete` (true once the run ended in order), `rank_files` (0, or how many files of single ranks hold the columns with
a rank axis) and, only while the run goes on, `segments` (the names of the segment files, oldest first, separated by
spaces).

Tables (`TABLES`): a group each, one dataset a column, one row a record: steps, evaluations, events, plans and scores.
A column's first axis is the table's (`ROW_AXES`), further ones are named in its `Field`. All columns of a table are
equally long. A column that no record gave is left out. What single records did not give is NaN (floats), -1
(integers), 255 (bytes) or "" (text); so is what pads records of different shapes to that of the largest.

Static groups, written once (`GROUPS`): config, environment and model. Their attributes are free, scalar, and carry
their unit in their name.

    config         yaml: the resolved configuration
    environment    attributes: library versions, launcher, world_size, replicas, device, ...
    model          attributes: name, num_blocks, num_heads, frozen_blocks (JSON, those that count as always run),
                   always_flops, full_flops, forward_only_flops (FLOP of one sample), ...; the map from parameters to
                   what owns them; the classes

Every dataset has the attributes `units` ("1" for pure numbers) and `description`, and HDF5 dimension scales: the
index along each axis, which are datasets at the root (rank, row, block, head, label, ...) and, for the first axis,
in the table's group.

All texts, in attributes too, are UTF-8 of fixed length. HDF5 keeps texts of variable length in its global heap, the
one structure without a checksum, where a few damaged bytes can send the library into an endless loop.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from d2ft_hpc.files import kinds

FORMAT = kinds.RESULTS
SCHEMA_VERSION = 2

Array = NDArray[Any]
Scalar = str | bool | int | float
Group = tuple[dict[str, Array | str], dict[str, Scalar]]
"""A static group: its datasets and its attributes."""
Table = dict[str, Array]
"""The columns of a table that some record gave; text as str arrays."""

Kind = Literal["text", "int64", "int32", "uint8", "float32", "float64"]
MISSING: dict[Kind, str | int | float] = {
    "text": "",
    "int64": -1,
    "int32": -1,
    "uint8": 255,
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


def _of_ranks(name: str, units: str, description: str, kind: Kind = "float64") -> Field:
    return Field(name, kind, units, description, ("rank",))


def _seconds_of_ranks(name: str, description: str) -> Field:
    return _of_ranks(f"{name}_seconds", "s", description, "float32")


_PLAN_AXES = ("row", "block", "head")
_STEP = Field("step", "int64", "1", "optimizer steps done before")

BYTE_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "point_to_point", "other")
"""Kinds of messages whose bytes are recorded, as columns `<kind>_bytes`."""
PHASES = ("data", "forward", "backward", "communication", "optimizer", "other")
"""Parts of a step's time, as columns `<phase>_seconds`; together they are the step."""

GROUPS: dict[str, dict[str, Field]] = {
    "config": _fields(Field("yaml", "text", "1", "resolved configuration of the run, YAML")),
    "environment": {},
    "model": _fields(
        Field("parameter", "text", "1", "name of each parameter, in timm's names", ("parameter",)),
        Field("parameter_size", "int64", "1", "numbers in each parameter", ("parameter",)),
        Field("parameter_class", "text", "1", "subnet, embedding, shared or classifier", ("parameter",)),
        Field("parameter_trained", "uint8", "1", "1 trained, 0 frozen", ("parameter",)),
        Field("subnet_parameters", "int64", "1", "numbers that each subnet owns", ("block", "head")),
        Field("class_name", "text", "1", "name of each class, in the order of the labels", ("class",)),
    ),
}

ROW_AXES = {
    "steps": "step",
    "evaluations": "evaluation",
    "events": "event",
    "plans": "plan",
    "scores": "scoring",
}
"""The first axis of each table."""
AXES = ("rank", "row", "side", "block", "head", "class", "label", "prediction", "parameter")
"""All other axes."""

TABLES: dict[str, dict[str, Field]] = {
    "steps": _fields(
        Field("step", "int64", "1", "optimizer step, counted from 0"),
        Field("epoch", "int64", "1", "epoch that the step belongs to"),
        Field("plan", "int64", "1", "index into plans, -1 for none"),
        Field("loss", "float64", "1", "training loss, mean over all samples of the step"),
        Field("learning_rate", "float64", "1", "learning rate of the step"),
        Field("gradient_norm", "float64", "1", "L2 norm of the gradient before clipping"),
        Field("samples", "int64", "1", "samples of the step over all ranks"),
        _of_ranks("rank_loss", "1", "training loss, mean over the rank's samples"),
        _of_ranks("rank_samples", "1", "samples of the rank", "int32"),
        _of_ranks("full_rows", "1", "rows (samples or micro-batches) that ran forward and backward", "int32"),
        _of_ranks("forward_only_rows", "1", "rows that ran forward only", "int32"),
        _of_ranks("left_out_rows", "1", "rows that did not run at all", "int32"),
        _of_ranks("dense_flops", "FLOP", "what the dense model would have computed"),
        _of_ranks("planned_flops", "FLOP", "what the plan asks for, always-run parts included"),
        _of_ranks("executed_flops", "FLOP", "what was computed, recomputed activations included"),
        _of_ranks("bytes_sent", "B", "bytes sent to other ranks, of all kinds"),
        _of_ranks("planned_bytes", "B", "what the message model says that the plan sends"),
        _of_ranks("dense_bytes", "B", "what it says that the dense model would send"),
        *(_of_ranks(f"{kind}_bytes", "B", f"bytes sent: {kind.replace('_', ' ')}") for kind in BYTE_KINDS),
        _of_ranks("memory_bytes", "B", "GPU: most memory allocated in the step; CPU: resident set after it"),
        _seconds_of_ranks("data", "waiting for input"),
        _seconds_of_ranks("forward", "forward pass"),
        _seconds_of_ranks("backward", "backward pass"),
        _seconds_of_ranks("communication", "held up by communication, waiting for slower ranks included"),
        _seconds_of_ranks("optimizer", "optimizer step"),
        _seconds_of_ranks("other", "the rest of the step"),
        _seconds_of_ranks("step", "the whole step, data included"),
        _seconds_of_ranks("waiting", "for slower ranks: communication_seconds less the least of any rank's"),
        _seconds_of_ranks("recording", "recording the steps before this one; not in step_seconds"),
    ),
    "evaluations": _fields(
        _STEP,
        Field("epoch", "int64", "1", "epochs begun before"),
        Field("accuracy", "float64", "1", "top-1 accuracy, 0 to 1"),
        Field("loss", "float64", "1", "mean loss"),
        Field("samples", "int64", "1", "samples evaluated"),
        Field("seconds", "float64", "s", "time the evaluation took"),
        Field("class_accuracy", "float32", "1", "share of each class's samples that were right", ("class",)),
        Field("confusion", "int32", "1", "samples by label and prediction", ("label", "prediction")),
    ),
    "events": _fields(
        _STEP,
        Field("time", "text", "1", "when, UTC, ISO 8601"),
        Field("kind", "text", "1", "plan, resume, checkpoint, recompute, signal, error, ..."),
        Field("text", "text", "1", "what happened"),
        Field("seconds", "float64", "s", "time it took"),
    ),
    "plans": _fields(
        Field("step", "int64", "1", "first optimizer step under the plan"),
        Field("operations", "uint8", "1", "0 SHORTCUT, 1 FORWARD_ONLY, 2 FULL", _PLAN_AXES),
        Field(
            "grids",
            "int64",
            "1",
            "patches of a row's images in training, down and across; 0: as the loader gives them",
            ("row", "side"),
        ),
        Field("hash", "text", "1", "SHA-256 of the plan"),
        Field("planner", "text", "1", "what made it"),
        Field("replicas", "int64", "1", "data-parallel replicas; row = slot * replicas + replica"),
        Field(
            "binding",
            "text",
            "1",
            "what a slot is: slot (a micro-batch's place) or sample (one drawn anew each step)",
        ),
        Field("objective", "float64", "1", "total score of the plan"),
        Field("bound", "float64", "1", "no plan within the budgets has a larger objective"),
        Field("gap", "float64", "1", "(bound - objective) / bound"),
        Field("status", "text", "1", "how the solver ended"),
        Field("solve_seconds", "float64", "s", "time that solving took"),
        Field("planned_compute", "float64", "1", "share of the dense FLOPs, all ranks together"),
        Field("planned_time", "float64", "1", "share of the dense step's time: the slowest rank's FLOPs"),
        Field("block_shapes", "int64", "1", "kernels that rank 0's blocks would need by now if compiled"),
        Field(
            "micro_batch_shapes", "int64", "1", "different shapes of the micro-batches of rank 0's replica"
        ),
        Field(
            "most_shapes", "int64", "1", "with more, blocks are not compiled; nor micro-batches CUDA graphs"
        ),
    ),
    "scores": _fields(
        _STEP,
        Field("forward", "float32", "1", "forward contribution", _PLAN_AXES),
        Field("backward", "float32", "1", "backward contribution", _PLAN_AXES),
        Field("forward_name", "text", "1", "what `forward` is"),
        Field("backward_name", "text", "1", "what `backward` is"),
        Field("seconds", "float64", "s", "time that measuring took, charged to the run"),
        Field("flops", "float64", "FLOP", "what measuring computed beside the steps, over all ranks"),
    ),
}

RANK_FIELDS = {name: field for name, field in TABLES["steps"].items() if field.axes == ("rank",)}
"""The columns of `steps` with a rank axis."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the most similar known one, or all of them."""
    known = sorted(known)
    match = get_close_matches(name, known, n=1)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(known) or 'none'}"
