"""The plan: which operation every attention head of every block runs on every row of one global batch."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
import zlib
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from d2ft_hpc.errors import PlanError
from d2ft_hpc.files import atomic, hdf5, kinds
from d2ft_hpc.files.untrusted import RefusedError, first_fault
from d2ft_hpc.planning.arrays import Operations

Grid = tuple[int, int]
"""Patches of an image, down and across."""

WORTH_SAYING = 0.01
"""A gap above this share of the best possible score is explained in words."""

_MAGIC = b"D2FTPLAN"
_VERSION = 1
_MOST_BYTES = 2**28
"""Of a plan that another rank sent: a billion entries."""
_PREFIX = struct.Struct("<8sHI")  # magic, version, length of the JSON header in bytes
_DIGEST_BYTES = hashlib.sha256().digest_size
_SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8)
_HDF5_FORMAT = kinds.PLAN
_HDF5_VERSION = 2
_HDF5_LIBRARY = ("v110", "v110")
"""Its metadata carry checksums."""
_EVIDENCE_ERROR = 1e-6
_MOST_PATCHES = 4096
"""Down or across an image."""


class _Fields(BaseModel):
    """What files and messages say of a plan beside its arrays."""

    model_config = ConfigDict(strict=True, extra="forbid")

    replicas: int
    binding: str
    planner: str
    objective: float
    bound: float
    gap: float
    status: str
    solve_seconds: float
    hash: str


class _Header(_Fields):
    """Of a message."""

    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    grids: list[Grid] | None = None


def image_size(grid: Grid, patch_size: Grid | None) -> str:
    """In pixels where those of a patch, down and across, are known, else in patches."""
    high, wide = patch_size or (1, 1)
    return f"{grid[0] * high} x {grid[1] * wide} {'patches' if patch_size is None else 'pixels'}"


class Operation(IntEnum):
    """What a subnet (one head with its slice of the FFN) does with a row.

    FULL runs forward and backward, FORWARD_ONLY runs forward without gradient, SHORTCUT runs nothing:
    activations and gradients pass along the residual. (arXiv 2504.12471: p_f, p_o, p_s.)
    """

    SHORTCUT = 0
    FORWARD_ONLY = 1
    FULL = 2


@dataclass(frozen=True, eq=False)
class SkipPlan:
    """The operations of one global batch, with the evidence of how good they are. A value: never changes.

    operations: uint8 [row, block, head] of `Operation` values, read-only; block and head are timm's indices.
    replicas: number of data-parallel replicas; row = slot * replicas + replica.
    binding: what a slot is. "slot": a micro-batch's place in the replica's batch. "sample": a sample's place in the
        order in which the replica draws its batch's samples, anew at each step.
    planner: name of what made the plan.
    objective: normalised score of the plan (`PlanProblem.objective`); NaN if it was made without scores.
    bound: no plan of the planner's kind that keeps the budgets scores more than this; NaN if not known.
    gap: (bound - objective) / bound, from 0 (proved optimal) to 1; NaN if not known.
    status: how the planner ended, one line.
    solve_seconds: wall-clock time of planning.
    grids: uint16 [row, 2], the patches (down, across) to which a row's images are scaled in training; None: images stay
        as they are.

    Two plans are equal if their `hash` is: the evidence does not count.

    Raises PlanError if shape, values, replicas or the texts are not as said, or the evidence contradicts itself.
    """

    operations: Operations
    replicas: int
    binding: Literal["slot", "sample"] = "slot"
    planner: str = "manual"
    objective: float = math.nan
    bound: float = math.nan
    gap: float = math.nan
    status: str = ""
    solve_seconds: float = 0.0
    grids: npt.NDArray[np.uint16] | None = None

    def __post_init__(self) -> None:
        given = np.asarray(self.operations)
        if given.ndim != 3 or given.size == 0:
            raise PlanError(f"A plan needs operations [row, block, head], got the shape {given.shape}.")
        if given.dtype.kind not in "ui":
            raise PlanError(f"A plan's operations must be integers, got the type {given.dtype}.")
        wrong = np.argwhere((given < Operation.SHORTCUT) | (given > Operation.FULL))
        if len(wrong):
            row, block, head = (int(index) for index in wrong[0])
            raise PlanError(
                f"A plan's operations are 0 (SHORTCUT), 1 (FORWARD_ONLY) or 2 (FULL), "
                f"got {given[row, block, head]} at row {row}, block {block}, head {head}."
            )
        if isinstance(self.replicas, bool) or not isinstance(self.replicas, int | np.integer):
            raise PlanError(f"A plan's replicas must be an integer, got {self.replicas!r}.")
        if self.replicas < 1 or given.shape[0] % self.replicas:
            raise PlanError(f"{given.shape[0]} rows cannot be divided over {self.replicas} replicas.")
        if self.binding not in ("slot", "sample"):
            raise PlanError(f"A plan's binding must be 'slot' or 'sample', got {self.binding!r}.")
        for name in ("planner", "status"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.isprintable():
                raise PlanError(f"A plan's {name} must be one line of printable text, got {text!r}.")
        # An array over bytes can never be made writeable again.
        frozen = np.frombuffer(given.astype(np.uint8).tobytes(), dtype=np.uint8).reshape(given.shape)
        object.__setattr__(self, "operations", frozen)
        object.__setattr__(self, "replicas", int(self.replicas))
        object.__setattr__(self, "grids", self._frozen_grids())
        for name in ("objective", "bound", "gap", "solve_seconds"):
            object.__setattr__(self, name, float(getattr(self, name)))
        self._check_evidence()

    def _frozen_grids(self) -> npt.NDArray[np.uint16] | None:
        if self.grids is None:
            return None
        given = np.asarray(self.grids)
        if given.shape != (len(self.operations), 2) or given.dtype.kind not in "ui":
            raise PlanError(
                f"A plan's grids are integers [{len(self.operations)}, 2], got {given.dtype} {list(given.shape)}."
            )
        wrong = ((given < 1) | (given > _MOST_PATCHES)).any(axis=1)
        if wrong.any():
            raise PlanError(
                f"A plan's grids have 1 to {_MOST_PATCHES} patches a side, got {given[wrong][0].tolist()}."
            )
        return np.frombuffer(given.astype("<u2").tobytes(), dtype="<u2").reshape(given.shape)

    def _check_evidence(self) -> None:
        objective, bound, gap = self.objective, self.bound, self.gap
        for name in ("objective", "bound", "gap", "solve_seconds"):
            if math.isinf(getattr(self, name)):
                raise PlanError(f"A plan's {name} is a finite number, or NaN if not known; got infinity.")
        if not self.solve_seconds >= 0:
            raise PlanError(f"A plan's solve_seconds cannot be {self.solve_seconds:g}.")
        if bound < objective - _EVIDENCE_ERROR * abs(objective):
            raise PlanError(f"A plan's objective {objective:g} is above its bound {bound:g}.")
        expected = (bound - objective) / bound if bound > 0 else gap
        if gap < 0 or (math.isfinite(expected) and abs(gap - expected) > _EVIDENCE_ERROR):
            raise PlanError(
                f"A plan's gap is (bound - objective) / bound and not negative; got {gap:g} with the objective "
                f"{objective:g} and the bound {bound:g}."
            )

    @classmethod
    def dense(cls, slots: int, replicas: int, num_blocks: int, num_heads: int) -> SkipPlan:
        """The plan that skips nothing: every subnet FULL in every row."""
        if min(slots, replicas, num_blocks, num_heads) < 1:
            raise PlanError(
                f"A plan needs at least one slot, replica, block and head, "
                f"got {slots}, {replicas}, {num_blocks} and {num_heads}."
            )
        shape = (slots * replicas, num_blocks, num_heads)
        operations = np.full(shape, Operation.FULL, dtype=np.uint8)
        return cls(operations, replicas, planner="dense", gap=0.0, status="dense")

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of shape, replicas and operations; also of the binding unless it is "slot", and of grids if
        there are any."""
        head = struct.pack("<4q", *self.operations.shape, self.replicas)
        if self.binding != "slot":
            head += self.binding.encode()
        if self.grids is not None:
            head += b"grids" + self.grids.tobytes()
        return hashlib.sha256(head + self.operations.tobytes()).hexdigest()

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all of the plan, evidence included."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def num_rows(self) -> int:
        return int(self.operations.shape[0])

    @property
    def slots(self) -> int:
        """Rows of one replica."""
        return self.num_rows // self.replicas

    @property
    def num_blocks(self) -> int:
        return int(self.operations.shape[1])

    @property
    def num_heads(self) -> int:
        return int(self.operations.shape[2])

    @cached_property
    def is_dense(self) -> bool:
        return bool((self.operations == Operation.FULL).all())

    def __eq__(self, other: object) -> bool:
        return self.hash == other.hash if isinstance(other, SkipPlan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.hash)

    def for_replica(self, replica: int) -> Operations:
        """The operations of one replica, uint8 [slot, block, head], read-only."""
        if not 0 <= replica < self.replicas:
            raise PlanError(f"The plan has replicas 0 to {self.replicas - 1}, asked for {replica}.")
        return self.operations[replica :: self.replicas]

    @property
    def evidence(self) -> str:
        """Planner, status and gap, for one line of text; a gap that is worth knowing is spelt out."""
        if math.isnan(self.gap):
            gap = "gap not known"
        elif self.gap <= WORTH_SAYING:
            gap = f"gap {self.gap:.1e}"
        else:
            gap = (
                f"gap {self.gap:.1%}: its score is {self.objective:.6g}, the best may reach {self.bound:.6g}"
            )
        return f"{self.planner}, {self.status}, {gap}"

    def in_words(self, patch_size: Grid | None) -> str:
        """What rows train on, and who chose it; patch_size: pixels of a patch, down and across; None: not known."""
        grid = self.grid_of(0)
        parts = [] if grid is None else [f"images of {image_size(grid, patch_size)}"]
        parts += ["all heads of all blocks"] if self.is_dense else [f"planner {self.evidence}"]
        return ", ".join(parts)

    def grid_of(self, row: int) -> Grid | None:
        """Patches down and across of a row's images; None: as they come."""
        if self.grids is None:
            return None
        down, across = self.grids[row].tolist()
        return down, across

    def at(self, grid: Grid | None) -> SkipPlan:
        """The same operations on images of this many patches in every row."""
        if grid is None:
            return self if self.grids is None else replace(self, grids=None)
        if self.grids is not None and (self.grids == grid).all():
            return self  # as in nearly every step of a run
        return replace(self, grids=np.full((self.num_rows, 2), grid, dtype=np.uint16))

    def grids_of(self, replica: int) -> npt.NDArray[np.uint16] | None:
        """The grids of one replica's rows, uint16 [slot, 2]; None: images stay as they are."""
        return None if self.grids is None else self.grids[replica :: self.replicas]

    def shares(self) -> dict[Operation, float]:
        """The fraction of all entries that run each operation; the fractions sum to 1."""
        counts = np.bincount(self.operations.ravel(), minlength=len(Operation))
        return {operation: float(counts[operation] / self.operations.size) for operation in Operation}

    def differs_from(self, other: SkipPlan) -> dict[tuple[Operation, Operation], int]:
        """How many entries change from each operation (here) to each other one (there); empty if none.

        Raises PlanError if the plans are of different shapes.
        """
        if (self.operations.shape, self.replicas) != (other.operations.shape, other.replicas):
            raise PlanError(
                f"Plans of different shapes cannot be compared: {self.operations.shape} with "
                f"{self.replicas} replicas and {other.operations.shape} with {other.replicas}."
            )
        changes = {
            (before, after): int(np.count_nonzero((self.operations == before) & (other.operations == after)))
            for before in Operation
            for after in Operation
            if before != after
        }
        return {change: count for change, count in changes.items() if count}

    def to_bytes(self) -> bytes:
        """The plan as bytes: a JSON header and 2 bits an entry, with a checksum over all of it."""
        header = {name: getattr(self, name) for name in _Fields.model_fields} | {
            "shape": list(self.operations.shape)
        }
        if self.grids is not None:
            header["grids"] = self.grids.tolist()
        text = json.dumps(header).encode()
        body = _PREFIX.pack(_MAGIC, _VERSION, len(text)) + text + _pack(self.operations)
        return body + hashlib.sha256(body).digest()

    def to_message(self) -> bytes:
        """`to_bytes`, compressed, from rank 0 to all: rows that many replicas follow take hardly more than those of
        one."""
        return zlib.compress(self.to_bytes())

    @classmethod
    def from_message(cls, message: bytes) -> SkipPlan:
        """The plan that another rank sent by `to_message`; what comes from a file is for `from_bytes`.

        Raises PlanError as `from_bytes` does.
        """
        unpacker = zlib.decompressobj()
        try:
            whole = unpacker.decompress(message, _MOST_BYTES)
        except zlib.error:
            whole = b""
        if not unpacker.eof:
            raise PlanError(f"These {len(message)} bytes are not a plan that a rank sent.")
        return cls.from_bytes(whole)

    @classmethod
    def from_bytes(cls, message: bytes) -> SkipPlan:
        """The plan that `to_bytes` wrote.

        Raises PlanError if the message is foreign, damaged, cut short or of another version. Memory is allocated only
        after the header's sizes were checked.
        """
        message = bytes(message)
        if len(message) < _PREFIX.size + _DIGEST_BYTES or not message.startswith(_MAGIC):
            raise PlanError(f"These {len(message)} bytes are not a plan.")
        body, digest = message[:-_DIGEST_BYTES], message[-_DIGEST_BYTES:]
        _, version, header_bytes = _PREFIX.unpack_from(body)
        if version != _VERSION:
            raise PlanError(f"The plan is of format version {version}, this program reads {_VERSION}.")
        if hashlib.sha256(body).digest() != digest:
            raise PlanError("The plan is damaged: its checksum does not match.")
        packed = body[_PREFIX.size + header_bytes :]
        try:
            header = _Header.model_validate_json(body[_PREFIX.size : _PREFIX.size + header_bytes])
        except ValidationError as error:
            raise PlanError(f"The plan is damaged: {first_fault(error)}.") from error
        if len(packed) != (math.prod(header.shape) + 3) // 4:
            raise PlanError(f"The plan is damaged: {len(packed)} bytes do not hold the shape it states.")
        operations = _unpack(packed, header.shape)
        if _pack(operations) != packed:
            raise PlanError("The plan is damaged: the bits after its last entry are not zero.")
        grids = None if header.grids is None else np.array(header.grids)
        return cls._from_fields(operations, grids, header.model_dump(exclude={"shape", "grids"}), "The plan")

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as HDF5: dataset `operations` and one attribute a field. Replaces `path` at once.

        Raises PlanError if the file cannot be written; an older file of that name is then unharmed.
        """
        image = io.BytesIO()  # HDF5 does not recover from a full disk
        with h5py.File(image, "w", libver=_HDF5_LIBRARY) as file:
            file.create_dataset("operations", data=self.operations)
            if self.grids is not None:
                file.create_dataset("grids", data=self.grids)
            file.attrs["version"] = _HDF5_VERSION
            fields = {name: getattr(self, name) for name in _Fields.model_fields}
            for name, value in {"format": _HDF5_FORMAT, "digest": self.digest, **fields}.items():
                file.attrs[name] = _fixed(value) if isinstance(value, str) else value
        try:
            atomic.write(Path(path), image.getbuffer(), shared=True)
        except OSError as error:
            raise PlanError(
                f"The plan cannot be written to {os.fspath(path)}: {hdf5.reason(error)}; choose another file (--save)"
            ) from error

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> SkipPlan:
        """Read a plan that `write` wrote. Raises PlanError if the file is missing, foreign or damaged."""
        source = os.fspath(path)
        with hdf5.opened(Path(path), PlanError, "make the plan by d2ft-hpc plan --save") as file:
            if other := kinds.other_kind(file, _HDF5_FORMAT):
                raise PlanError(f"{other}, not a saved plan; make one by d2ft-hpc plan --save")
            version = hdf5.read_attributes(file, ["version"])["version"]
            if version != _HDF5_VERSION:
                raise PlanError(
                    f"a plan of format version {version!r}, this program reads {_HDF5_VERSION}: make the plan anew"
                )
            fields = hdf5.read_attributes(file, ["format", "digest", *_Fields.model_fields])
            if fields.pop("format") != _HDF5_FORMAT:
                raise PlanError("an HDF5 file, but not a plan")
            digest = fields.pop("digest")
            operations = hdf5.child(file, "operations")
            if operations is None or operations.dtype != np.uint8 or len(operations.shape) != 3:
                raise RefusedError("it has no operations uint8 [row, block, head]")
            allowance = hdf5.Allowance(file.id.get_filesize())
            values = hdf5.read_array(operations, allowance)
            of_file = hdf5.child(file, "grids")
            grids = None if of_file is None else hdf5.read_array(of_file, allowance)
        plan = cls._from_fields(values, grids, fields, source)
        if plan.digest != digest:
            raise PlanError(
                f"{source} is damaged: its evidence does not match its digest; make the plan anew."
            )
        return plan

    @classmethod
    def _from_fields(
        cls,
        operations: Operations,
        grids: npt.NDArray[Any] | None,
        fields: dict[str, Any],
        source: str,
    ) -> SkipPlan:
        try:
            known = _Fields.model_validate(fields).model_dump()
            stated = known.pop("hash")
            plan = cls(operations, grids=grids, **known)
        except (PlanError, ValidationError) as error:
            fault = first_fault(error) if isinstance(error, ValidationError) else error
            raise PlanError(f"{source} is damaged: {fault}") from error
        if plan.hash != stated:
            raise PlanError(f"{source} is damaged: its operations do not match its hash.")
        return plan


def _pack(operations: Operations) -> bytes:
    """Four entries a byte, the first in the lowest bits, zero bits at the end."""
    flat = operations.ravel()
    padded = np.zeros((flat.size + 3) // 4 * 4, dtype=np.uint8)
    padded[: flat.size] = flat
    packed: Operations = np.bitwise_or.reduce(padded.reshape(-1, 4) << _SHIFTS, axis=1)
    return packed.tobytes()


def _unpack(packed: bytes, shape: tuple[int, int, int]) -> Operations:
    quads = (np.frombuffer(packed, dtype=np.uint8)[:, None] >> _SHIFTS) & 3
    return quads.ravel()[: math.prod(shape)].reshape(shape).astype(np.uint8)


def _fixed(text: str) -> npt.NDArray[np.bytes_]:
    """The text as HDF5 keeps it without its global heap, which has no checksum."""
    encoded = text.encode()
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", max(len(encoded), 1)))
