"""Write a run's results so that a kill at any moment leaves a file that plain h5py opens.

While the run goes on, `results.h5` is a small linking file and the data lie in closed, never changed segment
files in `results.segments/`. A flush builds a segment in memory, writes it under a temporary name, and
renames it; then it does the same for a new linking file. So at every instant `results.h5` is whole and points
at whole segments. No HDF5 library ever has the files open for writing, hence no HDF5 file lock is taken on
any file system. `close` joins everything into one real file.

Segments are merged as they grow, so that each is at least twice as large as the next: their number, and how
often a row is rewritten, grow with the logarithm of the run's length.
"""

import errno
import io
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

import d2ft_hpc
from d2ft_hpc.errors import ResultsError
from d2ft_hpc.results import schema
from d2ft_hpc.results.reader import Contents, join_rows, open_run, read_contents, segments_folder
from d2ft_hpc.results.schema import (
    FORMAT,
    GROUPS,
    MISSING,
    NUMBERED,
    SCHEMA_VERSION,
    TABLES,
    Array,
    Field,
    Group,
    Scalar,
)

_GRACE_SECONDS = 10.0
"""How long a merged segment stays for readers that opened an older linking file."""
_FORMAT_VERSIONS = ("v110", "v110")
"""HDF5 1.10 is the oldest with virtual datasets; its metadata carry checksums."""


@dataclass(frozen=True)
class _Segment:
    name: str
    nbytes: int
    columns: dict[str, tuple[tuple[int, ...], Any]]
    """Shape and stored type of every column by its path in the file."""
    groups: tuple[str, ...]


class ResultsWriter:
    """Writes one run's results (`schema`). Only rank 0 has one.

    As a context manager it closes the file at the end; after an exception it keeps everything that was
    appended and leaves the file marked incomplete.

    Args:
        path: the file to create, e.g. runs/demo/results.h5; its folder is created.
        flush_seconds: rows are on disk at the latest with the first `append` after this time; a kill loses
            less than one such interval.

    Raises:
        ResultsError: the file exists, or cannot be written.
    """

    def __init__(self, path: Path | str, *, flush_seconds: float = 5.0) -> None:
        self._prepare(Path(path).absolute(), flush_seconds, _now())
        self._make_folder(of_new_run=True)
        self._write_links(self._segments)

    @classmethod
    def resume(cls, path: Path | str, *, last_step: int, flush_seconds: float = 5.0) -> "ResultsWriter":
        """Continue an existing file, whether its run was killed or ended in order.

        Table rows of steps after `last_step` (the last step in the checkpoint that the run resumes from) are
        dropped. Static groups stay; `put` replaces those of the same name.

        Raises:
            ResultsError: the file is missing, damaged, not ours, or cannot be written.
        """
        with open_run(path) as run:
            tables, groups = run.contents()
            writer = cls.__new__(cls)
            writer._prepare(run.path, flush_seconds, run.created)
        for name, columns in tables.items():
            keep = columns["step"] <= last_step
            tables[name] = {column: values[keep] for column, values in columns.items()}
        writer._make_folder()
        stale = list(writer._folder.iterdir())
        writer._sequence = max((int(f.stem) for f in stale if f.stem.isdigit()), default=0)
        writer._store(Contents(tables, groups), [])
        for file in stale:
            file.unlink(missing_ok=True)
        return writer

    def _prepare(self, path: Path, flush_seconds: float, created: str) -> None:
        self.path = path
        self._folder = segments_folder(path)
        self._flush_seconds = flush_seconds
        self._created = created
        self._rows: dict[str, list[dict[str, Array]]] = {table: [] for table in TABLES}
        self._groups: dict[str, Group] = {}
        self._segments: list[_Segment] = []
        self._sequence = 0
        self._superseded: list[tuple[float, Path]] = []
        self._flushed_at = time.monotonic()
        self._closed = False

    def put(
        self,
        group: str,
        data: Mapping[str, Array | int | float | str],
        attrs: Mapping[str, Scalar] | None = None,
    ) -> None:
        """Store a static group ("config", "model", "plans/0", ...); replaces one of the same name.

        Args:
            group: a name of `schema.GROUPS`, with a number where there are many.
            data: the group's datasets; names, kinds and units are those of the schema.
            attrs: numbers and texts.

        Raises:
            ResultsError: the schema has no such group or dataset, a value does not fit, or the disk is full.
        """
        kind, _, member = group.partition("/")
        if kind not in GROUPS:
            raise ResultsError(f"results have no group {group!r}: {schema.nearest(kind, GROUPS)}")
        if (kind in NUMBERED) != member.isdecimal() or (member and kind not in NUMBERED):
            form = f"{kind}/<number>" if kind in NUMBERED else kind
            raise ResultsError(f"results have no group {group!r}: use {form!r}")
        datasets: dict[str, Array | str] = {}
        for name, value in data.items():
            if name not in GROUPS[kind]:
                raise ResultsError(f"results have no {group}/{name}: {schema.nearest(name, GROUPS[kind])}")
            field = GROUPS[kind][name]
            datasets[name] = (
                _clean(str(value)) if field.kind == "text" else _checked(f"{group}/{name}", value, field)
            )
        self._groups[group] = (
            datasets,
            {name: _checked_attribute(f"{group}@{name}", value) for name, value in (attrs or {}).items()},
        )
        self._flush_when_due()

    def append(self, table: str, row: Mapping[str, Scalar | Array]) -> None:
        """Add a row to the table "steps", "evaluations" or "events".

        Args:
            table: a name of `schema.TABLES`. row: values by column: a number or text, or for per-rank columns
                one number a rank, [world_size]. `step` is required; other columns that are left out are
                stored as missing.

        Raises:
            ResultsError: the schema has no such table or column, a value does not fit, or the disk is full.
        """
        if table not in TABLES:
            raise ResultsError(f"results have no table {table!r}: {schema.nearest(table, TABLES)}")
        if "step" not in row:
            raise ResultsError(f"a row of {table} has no `step`: every row needs one")
        values: dict[str, Array] = {}
        for name, value in row.items():
            if name not in TABLES[table]:
                raise ResultsError(f"{table} has no column {name!r}: {schema.nearest(name, TABLES[table])}")
            values[name] = _checked(f"{table}.{name}", value, TABLES[table][name])
        widths = {name: len(value) for name, value in values.items() if value.ndim}
        if len(set(widths.values())) > 1:
            raise ResultsError(f"the per-rank columns of a row of {table} have different lengths: {widths}")
        self._rows[table].append(values)
        self._flush_when_due()

    def flush(self) -> None:
        """Put everything appended so far on disk.

        Raises:
            ResultsError: the disk is full or cannot be written; what was on disk before still opens, and the
                next flush tries again with all that is missing.
        """
        if self._closed:
            raise ResultsError(f"{self.path} is closed: nothing can be added to it")
        self._remove_superseded(time.monotonic() - _GRACE_SECONDS)
        if self._groups or any(self._rows.values()):
            tables = {table: _stack(table, rows) for table, rows in self._rows.items()}
            self._store(Contents(tables, dict(self._groups)), self._segments)
            self._groups = {}
            self._rows = {table: [] for table in TABLES}
        self._flushed_at = time.monotonic()

    def close(self, *, complete: bool = True) -> None:
        """Flush, join everything into one file, and remove the segments. A second call does nothing.

        Args:
            complete: whether the run ended in order.

        Raises:
            ResultsError: the disk is full or cannot be written; what was on disk before still opens.
        """
        if self._closed:
            return
        self.flush()
        self._remove_superseded(math.inf)  # the joined file needs the room
        whole = _encode(self._read(self._segments), self._root_attributes(complete))
        _write_atomically(self.path, whole)
        self._closed = True
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "ResultsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if fault is None:
            self.close()
            return
        try:
            self.close(complete=False)
        except ResultsError as second:  # the first fault is the one to report
            if not isinstance(fault, ResultsError):
                logging.getLogger(__name__).error("%s", second)

    def _flush_when_due(self) -> None:
        if time.monotonic() - self._flushed_at >= self._flush_seconds:
            self.flush()

    def _store(self, fresh: Contents, older: list[_Segment]) -> None:
        """Make `older` plus `fresh` the file's content: write one segment, then the linking file."""
        kept = list(older)
        merged: list[_Segment] = []
        nbytes = _nbytes(fresh)
        while kept and kept[-1].nbytes <= 2 * nbytes:
            merged.insert(0, kept.pop())
            nbytes += merged[0].nbytes
        if merged:
            past = self._read(merged)
            tables = {name: join_rows(name, [past.tables[name], fresh.tables[name]]) for name in TABLES}
            fresh = Contents(tables, {**past.groups, **fresh.groups})
        self._sequence += 1
        segment = _describe(f"{self._sequence:08d}.h5", fresh)
        file = self._folder / segment.name
        _write_atomically(file, _encode(fresh, self._root_attributes(complete=False)))
        try:
            self._write_links([*kept, segment])
        except ResultsError:
            file.unlink(missing_ok=True)
            raise
        self._segments = [*kept, segment]
        self._superseded += [(time.monotonic(), self._folder / old.name) for old in merged]

    def _read(self, segments: list[_Segment]) -> Contents:
        files: list[Any] = []
        try:
            for segment in segments:
                files.append(h5py.File(self._folder / segment.name, "r", locking=False))
            return read_contents(files)
        except OSError as fault:
            raise ResultsError(
                f"cannot read back {self._folder}: {fault}; leave that folder alone while the run goes on"
            ) from fault
        finally:
            for file in files:
                file.close()

    def _write_links(self, segments: list[_Segment]) -> None:
        attributes = self._root_attributes(complete=False)
        attributes["segments"] = " ".join(segment.name for segment in segments)
        _write_atomically(self.path, _encode_links(segments, self._folder.name, attributes))

    def _root_attributes(self, complete: bool) -> dict[str, Scalar]:
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "created": self._created,
            "package_version": d2ft_hpc.__version__,
            "complete": complete,
        }

    def _make_folder(self, of_new_run: bool = False) -> None:
        try:
            if of_new_run and (self.path.exists() or (self._folder.is_dir() and any(self._folder.iterdir()))):
                raise ResultsError(
                    f"{self.path} (or {self._folder.name}/ beside it) exists and is not overwritten: "
                    "resume that run, remove it, or choose another output folder"
                )
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise _cannot_write(self.path, fault) from fault

    def _remove_superseded(self, until: float) -> None:
        while self._superseded and self._superseded[0][0] <= until:
            with suppress(OSError):
                self._superseded[0][1].unlink()
            self._superseded.pop(0)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _clean(text: str) -> str:
    """Text that HDF5 can hold: valid UTF-8 without NUL."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _checked(name: str, value: Any, field: Field) -> Array:
    if field.kind == "text":
        return np.array(_clean(str(value)).encode())
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" or not np.can_cast(array.dtype, field.kind, "same_kind"):
        raise ResultsError(f"{name} = {value!r} is not of type {field.kind}: give numbers of that type")
    if field.axes == ("rank",):
        array = np.atleast_1d(array)
    if array.ndim != len(field.axes):
        form = f"an array [{', '.join(field.axes)}]" if field.axes else "a single number"
        raise ResultsError(f"{name} has the shape {array.shape}: give {form}")
    return array.astype(field.kind)


def _checked_attribute(name: str, value: Any) -> Scalar:
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, (bool, int, float)):
        raise ResultsError(
            f"the attribute {name} = {value!r} is neither a number nor a text: convert it to one"
        )
    return value


def _stack(table: str, rows: list[dict[str, Array]]) -> dict[str, Array]:
    width = max((len(value) for row in rows for value in row.values() if value.ndim), default=0)
    columns: dict[str, Array] = {}
    for field in TABLES[table].values():
        if field.kind == "text":
            texts = [bytes(row.get(field.name, np.array(b"")).item()).decode() for row in rows]
            columns[field.name] = np.array(texts, dtype=str)
            continue
        shape = (len(rows), width) if field.axes else (len(rows),)
        column = np.full(shape, MISSING[field.kind], dtype=field.kind)
        for i, row in enumerate(rows):
            if field.name in row and field.axes:
                column[i, : len(row[field.name])] = row[field.name]
            elif field.name in row:
                column[i] = row[field.name]
        columns[field.name] = column
    return columns


def _stored(values: Array | str) -> Array:
    """An array or a text as it is stored: text as UTF-8 of the width of the longest."""
    array = np.asarray(values)
    if array.dtype.kind != "U":
        return array
    encoded = np.array([text.encode() for text in array.flat], dtype=bytes).reshape(array.shape)
    return encoded.astype(h5py.string_dtype("utf-8", max(encoded.dtype.itemsize, 1)))


def _nbytes(contents: Contents) -> int:
    arrays = [column for table in contents.tables.values() for column in table.values()]
    arrays += [
        value for data, _ in contents.groups.values() for value in data.values() if not isinstance(value, str)
    ]
    return sum(array.nbytes for array in arrays)


def _describe(name: str, contents: Contents) -> _Segment:
    columns = {
        f"{table}/{column}": (values.shape, _stored(values).dtype)
        for table, fields in contents.tables.items()
        for column, values in fields.items()
    }
    return _Segment(name, _nbytes(contents), columns, tuple(contents.groups))


def _encode(contents: Contents, attributes: Mapping[str, Scalar]) -> bytes:
    image = io.BytesIO()
    with h5py.File(image, "w", libver=_FORMAT_VERSIONS) as file:
        _set_attributes(file, attributes)
        for table, columns in contents.tables.items():
            for column, values in columns.items():
                _label(file.create_dataset(f"{table}/{column}", data=_stored(values)), TABLES[table][column])
        for path, (data, group_attributes) in contents.groups.items():
            group = file.require_group(path)
            _set_attributes(group, group_attributes)
            for name, value in data.items():
                _label(group.create_dataset(name, data=_stored(value)), GROUPS[path.split("/")[0]][name])
    return image.getvalue()


def _encode_links(segments: list[_Segment], folder: str, attributes: Mapping[str, Scalar]) -> bytes:
    image = io.BytesIO()
    with h5py.File(image, "w", libver=_FORMAT_VERSIONS) as file:
        _set_attributes(file, attributes)
        for table, fields in TABLES.items():
            for field in fields.values():
                _label(_virtual_column(file, f"{table}/{field.name}", field, segments, folder), field)
        newest = {group: segment.name for segment in segments for group in segment.groups}
        for group, name in newest.items():
            file[group] = h5py.ExternalLink(f"{folder}/{name}", group)
    return image.getvalue()


def _virtual_column(file: Any, path: str, field: Field, segments: list[_Segment], folder: str) -> Any:
    """A virtual dataset that joins a column's pieces; a per-rank column is as wide as its widest piece."""
    pieces = [(segment.name, *segment.columns[path]) for segment in segments if segment.columns[path][0][0]]
    rows = sum(shape[0] for _, shape, _ in pieces)
    width = max((shape[1] for _, shape, _ in pieces), default=0) if field.axes else None
    if field.kind == "text":
        dtype = h5py.string_dtype("utf-8", max((dtype.itemsize for _, _, dtype in pieces), default=1))
    else:
        dtype = np.dtype(field.kind)
    layout = h5py.VirtualLayout((rows,) if width is None else (rows, width), dtype)
    if layout.shape[0] == 0 or width == 0:
        return file.create_dataset(path, layout.shape, dtype)
    start = 0
    for name, shape, stored in pieces:
        source = h5py.VirtualSource(f"{folder}/{name}".replace("%", "%%"), path, shape, dtype=stored)
        if width is None:
            layout[start : start + shape[0]] = source
        elif shape[1]:
            layout[start : start + shape[0], : shape[1]] = source
        start += shape[0]
    return file.create_virtual_dataset(
        path, layout, fillvalue=None if field.kind == "text" else MISSING[field.kind]
    )


def _label(dataset: Any, field: Field) -> None:
    _set_attributes(dataset, {"units": field.units, "description": field.description})


def _set_attributes(item: Any, attributes: Mapping[str, Scalar]) -> None:
    for name, value in attributes.items():
        item.attrs[name] = _stored(value) if isinstance(value, str) else value


def _write_atomically(path: Path, image: bytes) -> None:
    """Make `image` the content of `path`; a kill or a fault leaves all of the old content."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(image)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as fault:
        raise _cannot_write(path, fault) from fault


def _cannot_write(path: Path, fault: OSError) -> ResultsError:
    if fault.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free space (or quota) there, or choose an output folder on another file system"
    else:
        fix = "choose an output folder that this user can write to"
    return ResultsError(f"cannot write results to {path}: {os.strerror(fault.errno or 0)}; {fix}")
