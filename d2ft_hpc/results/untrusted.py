"""Reads tables and groups of results files that may be damaged or hostile (`files.untrusted`)."""

from collections.abc import Collection, Iterator
from typing import Any

import h5py
import numpy as np

from d2ft_hpc.errors import ResultsError
from d2ft_hpc.files.hdf5 import Allowance, child, read_array, read_attributes
from d2ft_hpc.files.kinds import other_kind
from d2ft_hpc.files.untrusted import RefusedError
from d2ft_hpc.results.schema import (
    AXES,
    FORMAT,
    GROUPS,
    SCHEMA_VERSION,
    TABLES,
    Array,
    Field,
    Group,
    Table,
)

_BYTES_OF_TEXT = 64
"""Bytes that Python needs for a text besides its characters."""


def check_root(file: Any) -> None:
    """Raises RefusedError if the file is none of ours, ResultsError if it is older or newer than what is read here."""
    if other := other_kind(file, FORMAT):
        raise ResultsError(f"it is {other}, not the results of a run; give a run folder or its results.h5")
    attributes = read_attributes(file)
    if attributes.get("format") != FORMAT:
        raise RefusedError(f"its `format` is {attributes.get('format')!r}")
    version = attributes.get("schema_version")
    if not isinstance(version, int) or version < 1:
        raise RefusedError(f"its `schema_version` is {version!r}")
    if version < SCHEMA_VERSION:
        raise ResultsError(
            f"its schema version is {version} and this package reads {SCHEMA_VERSION}; read it with the package that "
            f"wrote it, {attributes.get('package_version')} of that time"
        )
    if version > SCHEMA_VERSION:
        raise ResultsError(
            f"its schema version is {version} and this package reads up to {SCHEMA_VERSION}; "
            f"update d2ft-hpc to {attributes.get('package_version')} or newer"
        )


def outside_files(group: Any, *, is_root: bool = True) -> Iterator[str]:
    """The files that links in the root and its groups name. Neither these nor any dataset is opened."""
    for name in group:
        kind = group.id.links.get_info(name.encode()).type
        if kind == h5py.h5l.TYPE_EXTERNAL:
            yield group.get(name, getlink=True).filename
        elif kind != h5py.h5l.TYPE_HARD:
            raise RefusedError(f"{group.name}/{name} is a soft link")
        elif is_root and name not in AXES:
            inner = group[name]
            if not isinstance(inner, h5py.Group):
                raise RefusedError(f"{inner.name} is not a group")
            yield from outside_files(inner, is_root=False)


def read_dataset(dataset: Any, field: Field, allowance: Allowance) -> Array | str:
    """A dataset as an array of its field's kind, [*axes] or [row, *axes]; a scalar text as str."""
    if field.kind != "text":
        value = read_array(dataset, allowance)
        if value.dtype != field.kind:
            allowance.take(value.size * np.dtype(field.kind).itemsize, dataset.name)
        return np.asarray(value, dtype=field.kind)
    value = read_array(dataset, allowance, text=True)
    allowance.take(value.size * (4 * value.dtype.itemsize + _BYTES_OF_TEXT), dataset.name)
    if value.shape == ():
        return bytes(value.item()).decode()
    texts: list[str] = [text.decode() for text in value.flat]
    return np.asarray(texts, dtype=str).reshape(len(texts))


def read_table(
    file: Any, name: str, only: Collection[str] | None = None, allowance: Allowance | None = None
) -> Table:
    """The recorded columns of a table, or only those of them that are named.

    allowance: the memory that they may take; None: as much as the file's own size allows.
    """
    allowance = allowance or Allowance(file.id.get_filesize())
    group = child(file, name)
    columns: Table = {}
    rows = set()
    for field in TABLES[name].values():
        # The other datasets are not even opened: per-rank columns may be virtual datasets.
        dataset = child(group, field.name) if only is None or field.name in only else None
        if dataset is None:
            continue
        column = np.asarray(read_dataset(dataset, field, allowance))
        if column.ndim != 1 + len(field.axes):
            raise RefusedError(f"{dataset.name} has a wrong number of dimensions")
        columns[field.name] = column
        rows.add(len(column))
    if len(rows) > 1:
        raise RefusedError(f"the columns of {name} differ in length")
    return columns


def read_groups(file: Any) -> Iterator[tuple[str, Group]]:
    """All static groups by name."""
    for name in GROUPS:
        group = child(file, name)
        if group is not None:
            yield name, read_group(group, name)


def read_group(group: Any, name: str) -> Group:
    """A static group's datasets and attributes."""
    allowance = Allowance(group.file.id.get_filesize())
    data: dict[str, Array | str] = {}
    for field in GROUPS[name].values():
        dataset = child(group, field.name)
        if dataset is not None:
            data[field.name] = read_dataset(dataset, field, allowance)
            if np.ndim(data[field.name]) != len(field.axes):
                raise RefusedError(f"{dataset.name} has a wrong number of dimensions")
    return data, read_attributes(group)
