"""How tables and groups are stored in HDF5 files: in segments, in the linking file that joins them, and in the final
file."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from d2ft_hpc.results.schema import (
    GROUPS,
    MISSING,
    RANK_FIELDS,
    ROW_AXES,
    TABLES,
    Array,
    Field,
    Group,
    Scalar,
    Table,
)

FORMAT_VERSIONS = ("v110", "v110")
"""HDF5 1.10 is the oldest version with virtual datasets; its metadata have checksums."""
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


def describe(name: str, contents: Contents) -> Segment:
    shapes = {
        f"{table}/{column}": (values.shape, stored(values[:0] if values.dtype.kind != "U" else values).dtype)
        for table, table_columns in contents.tables.items()
        for column, values in table_columns.items()
    }
    return Segment(name, nbytes_of(contents), shapes, tuple(contents.groups))


def rows_of(segment: Segment, path: str) -> int:
    """Rows of a column's table in a segment, whether or not it has the column."""
    table = path.split("/")[0] + "/"
    return next((shape[0] for name, (shape, _) in segment.columns.items() if name.startswith(table)), 0)


def joined_shape(path: str, field: Field, segments: Sequence[Segment]) -> tuple[tuple[int, ...] | None, Any]:
    """Shape and stored type of a column over all segments; the shape is None if no segment has it."""
    pieces = [segment.columns[path] for segment in segments if path in segment.columns]
    if not pieces:
        return None, None
    rows = sum(rows_of(segment, path) for segment in segments)
    sizes = np.max([shape[1:] for shape, _ in pieces], axis=0, initial=0).astype(int)
    dtype = (
        np.dtype(field.kind)
        if field.kind != "text"
        else max((d for _, d in pieces), key=attrgetter("itemsize"))
    )
    return (rows, *(int(size) for size in sizes)), dtype


def link_column(group: Any, field: Field, segments: Sequence[Segment], folder: str) -> None:
    """A virtual dataset that joins a column's pieces."""
    path = f"{group.name.strip('/')}/{field.name}"
    shape, dtype = joined_shape(path, field, segments)
    if shape is None:
        return
    if 0 in shape:
        _label(group.create_dataset(field.name, shape, dtype), field)
        return
    layout = h5py.VirtualLayout(shape, dtype)
    start = 0
    for segment in segments:
        rows = rows_of(segment, path)
        if path in segment.columns and rows:
            piece, kind = segment.columns[path]
            if 0 not in piece:
                name = f"{folder}/{segment.name}".replace("%", "%%")
                place = (slice(start, start + rows), *(slice(size) for size in piece[1:]))
                layout[place] = h5py.VirtualSource(name, path, piece, dtype=kind)
        start += rows
    fill = None if field.kind == "text" else MISSING[field.kind]
    _label(group.create_virtual_dataset(field.name, layout, fillvalue=fill), field)


def link_rank_files(group: Any, field: Field, path: Path, ranks: int) -> None:
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


def encode(contents: Contents, attributes: Mapping[str, Scalar]) -> bytes:
    """A segment, without the attributes that the linking file gives its datasets. Only plans are compressed: the rest
    is soon merged or joined."""
    image = io.BytesIO()
    with h5py.File(image, "w", libver=FORMAT_VERSIONS) as file:
        set_attributes(file, attributes)
        for table, table_columns in contents.tables.items():
            group = file.create_group(table)
            for name, values in table_columns.items():
                image_of = stored(values)
                if TABLES[table][name].kind == "uint8":
                    create(group, TABLES[table][name], image_of.shape, image_of.dtype)[...] = image_of
                else:
                    group.create_dataset(name, data=image_of)
        for name, group in contents.groups.items():
            write_group(file, name, group)
    return image.getvalue()


def create(group: Any, field: Field, shape: tuple[int, ...], dtype: Any) -> Any:
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


def write_group(file: Any, name: str, contents: Group) -> None:
    group = file.create_group(name)
    set_attributes(group, contents[1])
    for dataset, value in contents[0].items():
        _label(group.create_dataset(dataset, data=stored(value)), GROUPS[name][dataset])


def attach_scales(file: Any, rank_files: int) -> None:
    """Dimension scales: the index along every axis that some dataset has."""

    def scale(parent: Any, axis: str, size: int) -> Any:
        if axis not in parent:
            index = Field(axis, "int64", "1", f"index along the axis {axis}")
            _label(parent.create_dataset(axis, data=np.arange(size)), index)
        if not parent[axis].is_scale:
            parent[axis].make_scale(axis)
        return parent[axis]

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
    set_attributes(dataset, {"units": field.units, "description": field.description})


def set_attributes(item: Any, attributes: Mapping[str, Scalar]) -> None:
    """Set attributes; text as UTF-8 of fixed length."""
    for name, value in attributes.items():
        item.attrs[name] = stored(value) if isinstance(value, str) else value


def stored(values: Array | str) -> Array:
    """An array or a text as it is stored: text as UTF-8 of the width of the longest."""
    array = np.asarray(values)
    if array.dtype.kind != "U":
        return array
    encoded = np.array([text.encode() for text in array.flat], dtype=bytes).reshape(array.shape)
    return encoded.astype(h5py.string_dtype("utf-8", max(encoded.dtype.itemsize, 1)))


def nbytes_of(contents: Contents) -> int:
    """The size in memory of what a segment holds."""
    arrays = [column for table in contents.tables.values() for column in table.values()]
    arrays += [
        value for data, _ in contents.groups.values() for value in data.values() if not isinstance(value, str)
    ]
    return sum(array.nbytes for array in arrays)
