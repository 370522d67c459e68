"""Plans by whole rows: how many rows of a micro-batch run, and how many of them run backward in each block.

The plan fixes counts; which rows they are is decided by their scores, on each replica, while it trains. Rows whose
backward stops in a block stay stopped in all blocks below, so the counts never grow towards the first block.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.problem import Floats, Ints


@dataclass(frozen=True, eq=False)
class RowCounts:
    """How many rows of every micro-batch run where, with the evidence of how good that is. A value: never changes.

    counts: int64 [replica, block], rows that run backward in the block, read-only; 1 <= counts[:, 0] <= ... <=
        counts[:, -1] <= rows_run. Block 0 is the first, next to the patch embedding.
    rows_run: int64 [replica], rows that run forward (through all blocks); the others are not run. Read-only.
    rows: rows of a micro-batch before any is dropped.
    seed: of the draws that choose the rows.
    objective: variance of the gradient estimate over that of keeping a single row everywhere.
    bound: no counts within the budget have less. gap: (objective - bound) / objective, 0 = proved optimal.
    status: how the planner ended, one line.

    Two plans are equal if their `hash` is: it covers counts, rows_run, rows and seed, not the evidence.

    Raises PlanError if shapes, types or values are not as said.
    """

    counts: Ints
    rows_run: Ints
    rows: int
    seed: int = 0
    objective: float = math.nan
    bound: float = math.nan
    gap: float = math.nan
    status: str = ""

    def __post_init__(self) -> None:
        for name, dimensions in (("counts", 2), ("rows_run", 1)):
            given = np.asarray(getattr(self, name))
            if given.ndim != dimensions or given.size == 0 or given.dtype.kind not in "ui":
                raise PlanError(
                    f"Row counts need {name} as whole numbers [replica{', block' * (dimensions - 1)}], "
                    f"got the shape {given.shape} of {given.dtype}."
                )
            frozen = np.frombuffer(given.astype(np.int64).tobytes(), dtype=np.int64).reshape(given.shape)
            object.__setattr__(self, name, frozen)
        if len(self.counts) != len(self.rows_run):
            raise PlanError(f"counts has {len(self.counts)} replicas, rows_run {len(self.rows_run)}.")
        chain = np.column_stack([np.ones_like(self.rows_run), self.counts, self.rows_run])
        wrong = np.argwhere(np.diff(chain, axis=1) < 0)
        if len(wrong) or self.rows_run.max() > self.rows:
            replica = int(wrong[0, 0]) if len(wrong) else int(self.rows_run.argmax())
            raise PlanError(
                f"Row counts must be at least 1, not grow towards the first block and not exceed rows_run and rows; "
                f"replica {replica} has {self.counts[replica].tolist()} of {self.rows_run[replica]} run of {self.rows}."
            )

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of shape, counts, rows_run, rows and seed."""
        head = np.array([*self.counts.shape, self.rows, self.seed], dtype="<i8").tobytes()
        body = self.counts.astype("<i8").tobytes() + self.rows_run.astype("<i8").tobytes()
        return hashlib.sha256(b"row counts" + head + body).hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.hash == other.hash if isinstance(other, RowCounts) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.hash)

    def to_bytes(self) -> bytes:
        """The plan as a message (JSON)."""
        fields = asdict(self) | {"counts": self.counts.tolist(), "rows_run": self.rows_run.tolist()}
        return json.dumps(fields | {"hash": self.hash}).encode()

    @classmethod
    def from_bytes(cls, message: bytes) -> RowCounts:
        """The plan that `to_bytes` wrote. Raises PlanError if the message is none, or damaged."""
        try:
            fields: dict[str, Any] = json.loads(message)
            stated = fields.pop("hash")
            counts, rows_run = (np.array(fields.pop(name), dtype=np.int64) for name in ("counts", "rows_run"))
            plan = cls(counts, rows_run, **fields)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise PlanError(f"These {len(message)} bytes are no row counts: {error}") from error
        if plan.hash != stated:
            raise PlanError("The row counts are damaged: they do not match their hash.")
        return plan


@dataclass(frozen=True, eq=False)
class RowCosts:
    """What a row costs, in any unit of compute.

    block: float64 [block] > 0, of a row's forward and backward in the block. forward_share: the forward's part of it,
    in [0, 1). always: of what runs outside the blocks for every row that runs (embedding, classifier), >= 0.
    """

    block: Floats
    forward_share: float
    always: float

    @property
    def run(self) -> float:
        """Of a row that runs forward only."""
        return float(self.always + self.forward_share * self.block.sum())

    @property
    def backward(self) -> Floats:
        """Of a row's backward in each block, float64 [block]."""
        return np.asarray((1 - self.forward_share) * self.block)

    @property
    def dense(self) -> float:
        """Of a row that runs backward in every block."""
        return float(self.run + self.backward.sum())

    def used(self, plan: RowCounts) -> Floats:
        """Each replica's compute over that of its dense micro-batch, float64 [replica]."""
        cost = plan.rows_run * self.run + plan.counts @ self.backward
        return np.asarray(cost / (plan.rows * self.dense), dtype=np.float64)
