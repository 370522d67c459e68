"""The results file on disk while a run goes on, and the one that it becomes at the end.

While the run goes on, `results.h5` is a small linking file and the data lie in closed, never changed segment files in
`results.segments/`. A segment is built in memory, written under a temporary name, and renamed; then the same is done
for a new linking file. So at every instant `results.h5` is whole and points at whole segments. No HDF5 library ever
has these files open for writing, hence no HDF5 lock is taken on any file system. `Segments.join` makes one real file
of them.

Segments are merged as they grow, so that each is at least twice as large as the next, until they are large: their
number, and how often a row is rewritten, grow with the logarithm of the run's length.
"""

import errno
import io
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

import d2ft_hpc
from d2ft_hpc.errors import ResultsError
from d2ft_hpc.results import columns
from d2ft_hpc.results.schema import (
    FORMAT,
    GROUPS,
    MISSING,
    RANK_FIELDS,
    ROW_AXES,
    SCHEMA_VERSION,
    TABLES,
    Array,
    Field,
    Group,
    Scalar,
    Table,
)
from d2ft_hpc.results.untrusted import read_groups, read_table

_GRACE_SECONDS = 10.0
"""How long a merged segment stays for readers that opened an older linking file."""
_LARGE_SEGMENT_BYTES = 64 * 2**20
"""Segments of this size are not merged any more."""
_FORMAT_VERSIONS = ("v110", "v110")
"""HDF5 1.10 is the oldest with virtual datasets; its metadata carry checksums."""
_COMPRESSED_FROM_BYTES = 4096
_CHUNK_BYTES = 1 << 20


class Contents(NamedTuple):
    """What one or several files hold: the recorded columns of every table, and the static groups."""

    tables: dict[str, Table]
    groups: dict[str, Group]


@dataclass(frozen=True)
class Segment:
    """One closed file: its name, size in memory, the shape and stored type of every column by path, its groups."""

    name: str
    nbytes: int
    columns: dict[str, tuple[tuple[int, ...], Any]]
    groups: tuple[str, ...]


def segments_folder(path: Path) -> Path:
    """The folder beside `path` that holds its segments while the run goes on."""
    return path.with_name(path.name.removesuffix(".h5") + ".segments")


def rank_file(path: Path, rank: int) -> Path:
    """The file beside `path` that holds one rank's columns, in runs with a file for each rank."""
    return path.with_name(path.name.removesuffix(".h5") + ".ranks") / f"{rank:05d}.h5"


class Segments:
    """The files of one run that is being written. All methods raise ResultsError where the disk refuses."""

    def __init__(self, path: Path, *, created: str, rank_files: int = 0) -> None:
        self.path, self.folder = path, segments_folder(path)
        self.created, self.rank_files = created, rank_files
        self._segments: list[Segment] = []
        self._superseded: list[tuple[float, Path]] = []
        stale = [int(file.stem) for file in self.folder.glob("*.h5") if file.stem.isdigit()]
        self._sequence = max(stale, default=0)

    def add(self, fresh: Contents, *, replace: bool = False) -> None:
        """Append to what the file holds, or replace all of it."""
        self._remove_superseded(time.monotonic() - _GRACE_SECONDS)
        kept = [] if replace else list(self._segments)
        merged: list[Segment] = []
        nbytes = _nbytes(fresh)
        while kept and kept[-1].nbytes <= min(2 * nbytes, _LARGE_SEGMENT_BYTES):
            merged.insert(0, kept.pop())
            nbytes += merged[0].nbytes
        if merged:
            with self._opened(merged) as files:
                past = [{name: read_table(file, name) for name in TABLES} for file in files]
                groups = {name: group for file in files for name, group in read_groups(file)}
            tables = {
                name: columns.join(name, [*(part[name] for part in past), fresh.tables[name]])
                for name in TABLES
            }
            fresh = Contents(tables, {**groups, **fresh.groups})
        self._sequence += 1
        segment = _describe(f"{self._sequence:08d}.h5", fresh)
        file = self.folder / segment.name
        write_atomically(file, _encode(fresh, self._attributes(complete=False)))
        try:
            self.write_links([*kept, segment])
        except ResultsError:
            file.unlink(missing_ok=True)
            raise
        self._segments = [*kept, segment]
        self._superseded += [(time.monotonic(), self.folder / old.name) for old in merged]

    def write_links(self, segments: Sequence[Segment] = ()) -> None:
        """Make `path` a linking file to the segments."""
        attributes = self._attributes(complete=False)
        attributes["segments"] = " ".join(segment.name for segment in segments)
        image = io.BytesIO()
        with h5py.File(image, "w", libver=_FORMAT_VERSIONS) as file:
            _set_attributes(file, attributes)
            for table, fields in TABLES.items():
                group = file.create_group(table)
                for field in fields.values():
                    if table == "steps" and field.name in RANK_FIELDS and self.rank_files:
                        _link_rank_files(group, field, self.path, self.rank_files)
                    else:
                        _link_column(group, field, segments, self.folder.name)
            newest = {group: segment.name for segment in segments for group in segment.groups}
            for name, source in newest.items():
                file[name] = h5py.ExternalLink(f"{self.folder.name}/{source}", name)
            _attach_scales(file, self.rank_files)
        write_atomically(self.path, image.getbuffer())

    def join(self, *, complete: bool) -> None:
        """Make `path` one real, compressed file.

        It is built in memory, because HDF5 does not recover from a full disk.
        """
        self._remove_superseded(float("inf"))  # the joined file needs the room
        image = io.BytesIO()
        with (
            self._opened(self._segments) as files,
            h5py.File(image, "w", libver=_FORMAT_VERSIONS) as whole,
        ):
            _set_attributes(whole, self._attributes(complete))
            for table, fields in TABLES.items():
                group = whole.create_group(table)
                for field in fields.values():
                    if table == "steps" and field.name in RANK_FIELDS and self.rank_files:
                        _link_rank_files(group, field, self.path, self.rank_files)
                    else:
                        self._join_column(group, field, files)
            for name, contents in {n: g for file in files for n, g in read_groups(file)}.items():
                _write_group(whole, name, contents)
            _attach_scales(whole, self.rank_files)
        write_atomically(self.path, image.getbuffer())

    def _join_column(self, group: Any, field: Field, files: Sequence[Any]) -> None:
        path = f"{group.name.strip('/')}/{field.name}"
        shape, dtype = _joined_shape(path, field, self._segments)
        if shape is None:
            return
        target = _create(group, field, shape, dtype)
        start = 0
        for segment, file in zip(self._segments, files, strict=True):
            rows = _rows_of(segment, path)
            if path in segment.columns and rows:
                part = read_table(file, path.split("/")[0], [field.name])[field.name]
                target[start : start + rows] = _stored(columns.fit(part, shape[1:], field))
            start += rows

    @contextmanager
    def _opened(self, segments: Sequence[Segment]) -> Iterator[list[Any]]:
        files: list[Any] = []
        try:
            for segment in segments:
                try:
                    files.append(h5py.File(self.folder / segment.name, "r", locking=False))
                except OSError as fault:
                    raise ResultsError(
                        f"cannot read back {self.folder}: {fault}; leave that folder alone while the run goes on"
                    ) from fault
            yield files
        finally:
            for file in files:
                file.close()

    def _attributes(self, complete: bool) -> dict[str, Scalar]:
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "created": self.created,
            "package_version": d2ft_hpc.__version__,
            "rank_files": self.rank_files,
            "complete": complete,
        }

    def _remove_superseded(self, until: float) -> None:
        while self._superseded and self._superseded[0][0] <= until:
            with suppress(OSError):
                self._superseded[0][1].unlink()
            self._superseded.pop(0)


def _describe(name: str, contents: Contents) -> Segment:
    shapes = {
        f"{table}/{column}": (values.shape, _stored(values[:0] if values.dtype.kind != "U" else values).dtype)
        for table, table_columns in contents.tables.items()
        for column, values in table_columns.items()
    }
    return Segment(name, _nbytes(contents), shapes, tuple(contents.groups))


def _rows_of(segment: Segment, path: str) -> int:
    """Rows of a column's table in a segment, whether or not it has the column."""
    table = path.split("/")[0] + "/"
    return next((shape[0] for name, (shape, _) in segment.columns.items() if name.startswith(table)), 0)


def _joined_shape(path: str, field: Field, segments: Sequence[Segment]) -> tuple[tuple[int, ...] | None, Any]:
    """Shape and stored type of a column over all segments; the shape is None if no segment has it."""
    pieces = [segment.columns[path] for segment in segments if path in segment.columns]
    if not pieces:
        return None, None
    rows = sum(_rows_of(segment, path) for segment in segments)
    sizes = np.max([shape[1:] for shape, _ in pieces], axis=0, initial=0).astype(int)
    dtype = np.dtype(field.kind) if field.kind != "text" else max((d for _, d in pieces), key=_itemsize)
    return (rows, *(int(size) for size in sizes)), dtype


def _itemsize(dtype: Any) -> int:
    return int(dtype.itemsize)


def _link_column(group: Any, field: Field, segments: Sequence[Segment], folder: str) -> None:
    """A virtual dataset that joins a column's pieces."""
    path = f"{group.name.strip('/')}/{field.name}"
    shape, dtype = _joined_shape(path, field, segments)
    if shape is None:
        return
    if 0 in shape:
        _label(group.create_dataset(field.name, shape, dtype), field)
        return
    layout = h5py.VirtualLayout(shape, dtype)
    start = 0
    for segment in segments:
        rows = _rows_of(segment, path)
        if path in segment.columns and rows:
            piece, stored = segment.columns[path]
            if 0 not in piece:
                name = f"{folder}/{segment.name}".replace("%", "%%")
                place = (slice(start, start + rows), *(slice(size) for size in piece[1:]))
                layout[place] = h5py.VirtualSource(name, path, piece, dtype=stored)
        start += rows
    fill = None if field.kind == "text" else MISSING[field.kind]
    _label(group.create_virtual_dataset(field.name, layout, fillvalue=fill), field)


def _link_rank_files(group: Any, field: Field, path: Path, ranks: int) -> None:
    """A virtual dataset with a column from each rank's file, as long as the longest of them."""
    layout = h5py.VirtualLayout((1, ranks), np.dtype(field.kind), maxshape=(None, ranks))
    end = h5py.h5s.UNLIMITED
    for rank in range(ranks):
        file = rank_file(path, rank)
        name = f"{file.parent.name}/{file.name}".replace("%", "%%")
        source = h5py.VirtualSource(
            name, f"steps/{field.name}", (1, 1), dtype=np.dtype(field.kind), maxshape=(None, 1)
        )
        layout[0:end, rank : rank + 1] = source[0:end, 0:1]
    _label(group.create_virtual_dataset(field.name, layout, fillvalue=MISSING[field.kind]), field)


def _encode(contents: Contents, attributes: Mapping[str, Scalar]) -> bytes:
    """A segment. Only plans are compressed: the rest is soon merged or joined."""
    image = io.BytesIO()
    with h5py.File(image, "w", libver=_FORMAT_VERSIONS) as file:
        _set_attributes(file, attributes)
        for table, table_columns in contents.tables.items():
            group = file.create_group(table)
            for name, values in table_columns.items():
                stored = _stored(values)
                if TABLES[table][name].kind == "uint8":
                    _create(group, TABLES[table][name], stored.shape, stored.dtype)[...] = stored
                else:
                    _label(group.create_dataset(name, data=stored), TABLES[table][name])
        for name, group in contents.groups.items():
            _write_group(file, name, group)
    return image.getvalue()


def _create(group: Any, field: Field, shape: tuple[int, ...], dtype: Any) -> Any:
    """An empty dataset, compressed if it is large enough to gain by it."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    options: dict[str, Any] = {}
    if nbytes >= _COMPRESSED_FROM_BYTES:
        rows = max(1, min(shape[0], _CHUNK_BYTES * shape[0] // nbytes))
        options = {
            "chunks": (rows, *shape[1:]),
            "compression": "gzip",
            "compression_opts": 1,
            "shuffle": True,
        }
    dataset = group.create_dataset(field.name, shape, dtype, **options)
    _label(dataset, field)
    return dataset


def _write_group(file: Any, name: str, contents: Group) -> None:
    group = file.create_group(name)
    _set_attributes(group, contents[1])
    for dataset, value in contents[0].items():
        _label(group.create_dataset(dataset, data=_stored(value)), GROUPS[name][dataset])


def _attach_scales(file: Any, rank_files: int) -> None:
    """Dimension scales: the index along every axis that some dataset has."""
    scales: dict[str, Any] = {}

    def scale(parent: Any, axis: str, size: int) -> Any:
        path = f"{parent.name.rstrip('/')}/{axis}"
        if path not in scales:
            scales[path] = (
                parent[axis] if axis in parent else parent.create_dataset(axis, data=np.arange(size))
            )
            scales[path].make_scale(axis)
            if "units" not in scales[path].attrs:
                index = Field(axis, "int64", "1", f"index along the axis {axis}")
                _label(scales[path], index)
        return scales[path]

    def attach(parent: Any, name: str, axes: Sequence[str], row_axis: str | None) -> None:
        dataset = parent[name]
        for dimension, (axis, size) in enumerate(zip(axes, dataset.shape, strict=True)):
            if name != axis:  # not a scale itself
                of = scale(parent if axis == row_axis else file, axis, size)
                if len(of) == size:
                    dataset.dims[dimension].attach_scale(of)

    for table, row_axis in ROW_AXES.items():
        for field in TABLES[table].values():
            in_other_files = table == "steps" and field.name in RANK_FIELDS and rank_files
            if field.name in file[table] and not in_other_files:
                attach(file[table], field.name, (row_axis, *field.axes), row_axis)
    for group, fields in GROUPS.items():
        if group in file and file.get(group, getlink=True).__class__ is h5py.HardLink:
            for field in fields.values():
                if field.axes and field.name in file[group]:
                    attach(file[group], field.name, field.axes, None)


def _label(dataset: Any, field: Field) -> None:
    _set_attributes(dataset, {"units": field.units, "description": field.description})


def _set_attributes(item: Any, attributes: Mapping[str, Scalar]) -> None:
    for name, value in attributes.items():
        item.attrs[name] = _stored(value) if isinstance(value, str) else value


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


def write_atomically(path: Path, image: bytes | memoryview) -> None:
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
        raise cannot_write(path, fault) from fault


def cannot_write(path: Path, fault: OSError) -> ResultsError:
    """The message for a fault of the file system."""
    if fault.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free space (or quota) there, or choose an output folder on another file system"
    else:
        fix = "choose an output folder that this user can write to"
    return ResultsError(f"cannot write results to {path}: {os.strerror(fault.errno or 0)}; {fix}")
