"""Columns of tables: from single records, and from parts of a table that may differ in shape."""

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from d2ft_hpc.files.hdf5 import Allowance
from d2ft_hpc.results.schema import MISSING, TABLES, Array, Field, Table


def stack(table: str, rows: Sequence[Mapping[str, Array | str]]) -> Table:
    """Records to columns: [row] or [row, *axes], padded to the largest value; columns that no row gave are left out."""
    columns: Table = {}
    for field in TABLES[table].values():
        given = [row[field.name] for row in rows if field.name in row]
        if not given:
            continue
        if field.kind == "text":
            columns[field.name] = np.array([str(row.get(field.name, "")) for row in rows], dtype=str)
            continue
        if not field.axes:
            numbers = [row.get(field.name, MISSING[field.kind]) for row in rows]
            columns[field.name] = np.array(numbers, dtype=field.kind)
            continue
        shape = np.max([np.shape(value) for value in given], axis=0).astype(int)
        columns[field.name] = missing(field, (len(rows), *shape))
        for target, row in zip(columns[field.name], rows, strict=True):
            if field.name in row:
                value = np.asarray(row[field.name])
                target[tuple(slice(size) for size in value.shape)] = value
    return columns


def missing(field: Field, shape: Sequence[int], allowance: Allowance | None = None) -> Array:
    """An array of the field's kind that says "not recorded" everywhere. allowance: the memory that it may take if it
    comes from a file, here and in all functions below."""
    if allowance is not None:
        itemsize = 4 if field.kind == "text" else np.dtype(field.kind).itemsize
        allowance.take(math.prod(map(int, shape)) * itemsize, field.name)
    return np.full(tuple(shape), MISSING[field.kind], dtype="U1" if field.kind == "text" else field.kind)


def length(columns: Table) -> int:
    """Rows of a table."""
    return next((len(column) for column in columns.values()), 0)


def join(table: str, parts: Sequence[Table], allowance: Allowance | None = None) -> Table:
    """Concatenate parts of a table; values become as large as the largest, and columns missing in a part are filled."""
    if len(parts) == 1:
        return dict(parts[0])
    joined = {}
    for field in TABLES[table].values():
        given = [part[field.name] for part in parts if field.name in part]
        if not given:
            continue
        shape = np.max([column.shape[1:] for column in given], axis=0, initial=0).astype(int)
        joined[field.name] = np.concatenate(
            [
                fit(part[field.name], shape, field, allowance)
                if field.name in part
                else missing(field, (length(part), *shape), allowance)
                for part in parts
            ]
        )
    return joined


def fit(column: Array, shape: Sequence[int], field: Field, allowance: Allowance | None = None) -> Array:
    """The column with each value padded to `shape`."""
    if column.shape[1:] == tuple(shape):
        return column
    if allowance is not None:
        allowance.take(len(column) * math.prod(map(int, shape)) * column.dtype.itemsize, field.name)
    widths = [(0, 0), *((0, int(size) - old) for size, old in zip(shape, column.shape[1:], strict=True))]
    return np.pad(column, widths, constant_values=MISSING[field.kind])


def complete(
    table: str, columns: Table, only: Collection[str] | None = None, allowance: Allowance | None = None
) -> Table:
    """The table with all columns of the schema, or those in `only`; values that were not recorded are marked as
    missing."""
    rows = length(columns)
    sizes: dict[str, int] = {}  # of each axis beyond the first, by name
    for name, column in columns.items():
        for axis, size in zip(TABLES[table][name].axes, column.shape[1:], strict=True):
            sizes[axis] = max(size, sizes.get(axis, 0))
    return {
        field.name: columns[field.name]
        if field.name in columns
        else missing(field, (rows, *(sizes.get(axis, 0) for axis in field.axes)), allowance)
        for field in TABLES[table].values()
        if only is None or field.name in only
    }
