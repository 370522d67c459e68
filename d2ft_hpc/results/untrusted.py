"""Reading HDF5 without trusting it.

A file may come from anybody, so nothing in it is followed blindly: links and virtual datasets are refused,
references, compound types and all filters but gzip too, and an array is never larger than what the file can hold.
"""

from collections.abc import Collection, Iterator
from typing import Any

import h5py
import numpy as np

from d2ft_hpc.errors import ResultsError
from d2ft_hpc.results.schema import (
    AXES,
    FORMAT,
    GROUPS,
    SCHEMA_VERSION,
    TABLES,
    Array,
    Field,
    Group,
    Scalar,
    Table,
)

_OF_DIMENSION_SCALES = ("CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "DIMENSION_LABELS")
_DEFLATE_FACTOR = 1032
"""No gzip stream is longer than this when unpacked."""
_UNPACKED_BYTES = 8 * 2**30
_FILTERS = (h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE)


def refuse(reason: str) -> ResultsError:
    """The fault of a file that is none of ours."""
    return ResultsError(f"not a results file of this package ({reason})")


def check_root(file: Any) -> int:
    """The schema version of a file of ours; raises ResultsError for others and for newer ones."""
    attributes = read_attributes(file)
    if attributes.get("format") != FORMAT:
        raise refuse(f"its `format` is {attributes.get('format')!r}")
    version = attributes.get("schema_version")
    if not isinstance(version, int) or version < 1:
        raise refuse(f"its `schema_version` is {version!r}")
    if version > SCHEMA_VERSION:
        raise ResultsError(
            f"its schema version is {version} and this package reads up to {SCHEMA_VERSION}; "
            f"update d2ft-hpc to {attributes.get('package_version')} or newer"
        )
    return version


def outside_files(group: Any) -> Iterator[str]:
    """The files that links in `group` and its subgroups name. Neither these nor any dataset is opened."""
    pending = [(group, 0)]
    while pending:
        group, depth = pending.pop()
        for name in group:
            kind = group.id.links.get_info(name.encode()).type
            if kind == h5py.h5l.TYPE_EXTERNAL:
                yield group.get(name, getlink=True).filename
                continue
            if kind != h5py.h5l.TYPE_HARD:
                raise refuse(f"{group.name}/{name} is a soft link")
            if depth == 0 and name not in AXES:
                inner = group[name]
                if not isinstance(inner, h5py.Group):
                    raise refuse(f"{inner.name} is not a group")
                pending.append((inner, depth + 1))


def child(group: Any, name: str) -> Any:
    """The object called `name` right in `group`, None if there is none; links are refused, not followed."""
    if group is None or not isinstance(group, h5py.Group) or not group.id.links.exists(name.encode()):
        return None
    if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise refuse(f"{group.name}/{name} is a link")
    return group[name]


def read_attributes(item: Any) -> dict[str, Scalar]:
    """All attributes, which must be scalar numbers or texts of fixed length; those of dimension scales apart."""
    values: dict[str, Scalar] = {}
    for name in item.attrs:
        if name in _OF_DIMENSION_SCALES:
            continue
        attribute = item.attrs.get_id(name)
        if attribute.shape != () or attribute.dtype.kind not in "biufS":
            raise refuse(f"the attribute {name!r} of {item.name} is not a number or a text of fixed length")
        value = item.attrs[name].item()
        values[name] = value.decode() if isinstance(value, bytes) else value
    return values


def read_dataset(dataset: Any, field: Field) -> Array | str:
    """A dataset as an array of its field's kind; a scalar text as str."""
    check_dataset(dataset, field)
    value: Any = dataset[()]
    if field.kind != "text":
        return np.asarray(value, dtype=field.kind)
    if dataset.shape == ():
        return bytes(value).decode()
    texts: list[str] = [text.decode() for text in value.flat]
    return np.asarray(texts, dtype=str).reshape(len(texts))


def check_dataset(dataset: Any, field: Field) -> None:
    """Raises ResultsError if reading the dataset could reach beyond the file, or yields something else."""
    where = dataset.name
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise refuse(f"{where} is not a plain dataset")
    filters = dataset.id.get_create_plist()
    if any(filters.get_filter(i)[0] not in _FILTERS for i in range(filters.get_nfilters())):
        raise refuse(f"{where} is filtered by something else than gzip")
    if dataset.shape is None or dataset.dtype.kind not in ("S" if field.kind == "text" else "biuf"):
        raise refuse(f"{where} is of type {dataset.dtype}")
    nbytes = dataset.size * dataset.dtype.itemsize
    room = dataset.file.id.get_filesize()
    if filters.get_nfilters():
        room = min(_DEFLATE_FACTOR * min(room, dataset.id.get_storage_size()), _UNPACKED_BYTES)
    if nbytes > room:
        raise refuse(f"{where} claims to be larger than its file can hold")


def read_table(file: Any, name: str, only: Collection[str] | None = None) -> Table:
    """The recorded columns of a table, or only those of them that are named."""
    group = child(file, name)
    columns: Table = {}
    rows = set()
    for field in TABLES[name].values():
        dataset = child(group, field.name)
        if dataset is None or (only is not None and field.name not in only):
            continue
        column = np.asarray(read_dataset(dataset, field))
        if column.ndim != 1 + len(field.axes):
            raise refuse(f"{dataset.name} has a wrong number of dimensions")
        columns[field.name] = column
        rows.add(len(column))
    if len(rows) > 1:
        raise refuse(f"the columns of {name} differ in length")
    return columns


def read_groups(file: Any) -> Iterator[tuple[str, Group]]:
    """All static groups by name."""
    for name in GROUPS:
        group = child(file, name)
        if group is not None:
            yield name, read_group(group, name)


def read_group(group: Any, name: str) -> Group:
    """A static group's datasets and attributes."""
    data: dict[str, Array | str] = {}
    for field in GROUPS[name].values():
        dataset = child(group, field.name)
        if dataset is not None:
            data[field.name] = read_dataset(dataset, field)
            if np.ndim(data[field.name]) != len(field.axes):
                raise refuse(f"{dataset.name} has a wrong number of dimensions")
    return data, read_attributes(group)
