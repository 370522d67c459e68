"""Read a results file without trusting it.

A file may come from anybody, so nothing in it is followed blindly: links and virtual datasets are never
resolved by HDF5 (the segments are opened by this module, by name, in the run's own segments folder),
references, compound types and filters are refused, and an array is never larger than the file that holds it.
"""

import errno
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import h5py
import numpy as np
import yaml

from d2ft_hpc.errors import ResultsError
from d2ft_hpc.results import schema
from d2ft_hpc.results.schema import (
    FORMAT,
    GROUPS,
    NUMBERED,
    SCHEMA_VERSION,
    TABLES,
    Array,
    Field,
    Group,
    Scalar,
)

_SEGMENT_NAME = re.compile(r"\d{8}\.h5")
_MEMBER_NAME = re.compile(r"\d{1,9}")
_ATTEMPTS = 5


class Contents(NamedTuple):
    """What one or several files hold: every column of every table, and the static groups by path."""

    tables: dict[str, dict[str, Array]]
    groups: dict[str, Group]


def segments_folder(path: Path) -> Path:
    """The folder beside `path` that holds its segments while the run goes on."""
    return path.with_name(path.name.removesuffix(".h5") + ".segments")


def open_run(path: Path | str) -> "RunResults":
    """Open a results file, or the `results.h5` of a run folder, for reading; also while the run writes it.

    Raises:
        ResultsError: there is no such file, it is damaged, or it is not a results file of this package.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "results.h5"
    if not path.is_file():
        raise ResultsError(f"no results file at {path}: give the path of a run folder or of its results.h5")
    path = path.resolve()
    with _faults_of(path):
        for attempt in range(_ATTEMPTS):
            main = h5py.File(path, "r", locking=False)
            files: list[Any] = []
            try:
                _check_root(main)
                if "segments" not in main.attrs:
                    return RunResults(path, main, [main])
                for name in _segment_names(main, path):
                    files.append(_open_segment(segments_folder(path) / name))
                    _check_root(files[-1])
                return RunResults(path, main, files)
            except FileNotFoundError:  # merged into another by the writer since the linking file was read
                _close([main, *files])
                if attempt == _ATTEMPTS - 1:
                    raise
            except BaseException:
                _close([main, *files])
                raise
    raise AssertionError("unreachable")


class RunResults:
    """An open results file. It shows the run as it was when opened; use it in a `with` block or `close` it.

    Attributes:
        path: the file.
        complete: the run ended in order (false while it goes on, and after a kill or an error).
        created: start of the run, UTC, ISO 8601.
        package_version: version of the package that wrote the file.
    """

    def __init__(self, path: Path, main: Any, files: Sequence[Any]) -> None:
        self.path = path
        self._main = main
        self._files = files
        attributes = _attributes(main)
        self.complete = bool(attributes.get("complete", False))
        self.created = str(attributes.get("created", ""))
        self.package_version = str(attributes.get("package_version", ""))

    @property
    def config(self) -> Any:
        """The run's resolved configuration as plain dicts, lists and scalars ({} if none was stored)."""
        with _faults_of(self.path):
            data, _ = self._group("config")
            return yaml.safe_load(str(data.get("yaml", ""))) or {}

    def table(self, name: str) -> dict[str, Array]:
        """All columns of "steps", "evaluations" or "events", each [row] or [row, rank] (see `schema`)."""
        if name not in TABLES:
            raise ResultsError(f"{self.path} has no table {name!r}: {schema.nearest(name, TABLES)}")
        with _faults_of(self.path):
            return join_rows(name, [_read_table(file, name) for file in self._files])

    def groups(self, name: str) -> list[Group]:
        """All of "scores" or "plans" by index, as (datasets, attributes); the attributes gain "index"."""
        with _faults_of(self.path):
            members: dict[int, Group] = {}
            for file in self._files:
                members.update({int(path.split("/")[1]): group for path, group in _read_groups(file, name)})
            return [(data, {**attributes, "index": i}) for i, (data, attributes) in sorted(members.items())]

    def attributes(self, name: str) -> dict[str, Scalar]:
        """The attributes of a static group, e.g. "model" or "plans/0" ({} if there is none)."""
        with _faults_of(self.path):
            return self._group(name)[1]

    def units(self, table: str, column: str) -> str:
        """The unit of a column as the file gives it ("1" for pure numbers)."""
        field = TABLES.get(table, {}).get(column)
        if field is None:
            name, known = f"{table}.{column}", (f"{t}.{c}" for t in TABLES for c in TABLES[t])
            raise ResultsError(f"{self.path} has no column {name}: {schema.nearest(name, known)}")
        with _faults_of(self.path):
            for file in self._files:
                dataset = _child(_child(file, table), column)
                if dataset is not None:
                    return str(_attributes(dataset).get("units", field.units))
        return field.units

    def elapsed_seconds(self, steps: Array) -> Array:
        """Measured training time up to and including each of `steps`, float64 [len(steps)], in seconds.

        Counts what everybody waits for: the slowest rank of every step, and scoring and planning done so far.
        """
        table = self.table("steps")
        costs = [*zip(table["step"], slowest(table["step_seconds"]), strict=True)]
        costs += [(number(a, "step"), number(a, "seconds")) for _, a in self.groups("scores")]
        costs += [(number(a, "first_step"), number(a, "solve_seconds")) for _, a in self.groups("plans")]
        when, seconds = np.array(costs, dtype=np.float64).reshape(-1, 2).T
        when = np.nan_to_num(when)
        order = np.argsort(when, kind="stable")
        total = np.concatenate([[0.0], np.nancumsum(seconds[order])])
        return np.asarray(total[np.searchsorted(when[order], steps, side="right")])

    def contents(self) -> Contents:
        """Everything in the file."""
        with _faults_of(self.path):
            return read_contents(self._files)

    def close(self) -> None:
        """Close the underlying files."""
        _close([self._main, *self._files])

    def __enter__(self) -> "RunResults":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _group(self, path: str) -> Group:
        for file in reversed(self._files):
            found = file
            for name in path.split("/"):
                found = _child(found, name)
            if found is not None:
                return _read_group(found, path.split("/")[0])
        return {}, {}


def read_contents(files: Sequence[Any]) -> Contents:
    """Join open files, oldest first: rows are concatenated; of groups with one name the newest stays."""
    tables = {name: join_rows(name, [_read_table(file, name) for file in files]) for name in TABLES}
    groups = {path: group for file in files for name in GROUPS for path, group in _read_groups(file, name)}
    return Contents(tables, groups)


def join_rows(table: str, parts: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """Concatenate parts of a table; a per-rank column becomes as wide as its widest part."""
    joined = {}
    for field in TABLES[table].values():
        columns = [part[field.name] for part in parts]
        if field.axes:
            width = max((column.shape[1] for column in columns), default=0)
            columns = [
                np.pad(c, ((0, 0), (0, width - c.shape[1])), constant_values=schema.MISSING[field.kind])
                for c in columns
            ]
        joined[field.name] = np.concatenate(columns) if columns else _no_rows(field)
    return joined


def slowest(seconds: Array) -> Array:
    """The slowest rank's seconds of each row, [row, rank] -> [row]; 0 where no rank has a measurement."""
    if seconds.shape[1] == 0:
        return np.zeros(len(seconds))
    return np.asarray(np.nan_to_num(np.fmax.reduce(seconds, axis=1)))


def _open_segment(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return h5py.File(path, "r", locking=False)


def number(attributes: Mapping[str, Scalar], name: str) -> float:
    """A numeric attribute, NaN if it is missing or a text."""
    value = attributes.get(name)
    return float(value) if isinstance(value, (int, float)) else math.nan


@contextmanager
def _faults_of(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or hostile file provokes in the libraries below into one message."""
    try:
        yield
    except ResultsError as fault:
        raise ResultsError(f"cannot read {path}: {fault}") from fault
    except FileNotFoundError as fault:
        raise ResultsError(
            f"cannot read {path}: {fault.filename} is missing; a run that has not ended keeps its data in "
            f"{segments_folder(path).name}/ beside the file: copy or move both together"
        ) from fault
    except PermissionError as fault:
        raise ResultsError(f"cannot read {path}: permission denied; ask its owner for read access") from fault
    except Exception as fault:
        raise ResultsError(
            f"cannot read {path}: damaged or not an HDF5 file ({fault}); restore it from a copy"
        ) from fault


def _refuse(reason: str) -> ResultsError:
    return ResultsError(f"not a results file of this package ({reason})")


def _check_root(file: Any) -> None:
    attributes = _attributes(file)
    if attributes.get("format") != FORMAT:
        raise _refuse(f"its `format` is {attributes.get('format')!r}")
    version = attributes.get("schema_version")
    if not isinstance(version, int) or version < 1:
        raise _refuse(f"its `schema_version` is {version!r}")
    if version > SCHEMA_VERSION:
        raise ResultsError(
            f"its schema version is {version} and this package reads up to {SCHEMA_VERSION}; "
            f"update d2ft-hpc to {attributes.get('package_version')} or newer"
        )


def _segment_names(main: Any, path: Path) -> list[str]:
    """The segments of a linking file, after checking that it points at nothing else."""
    folder = segments_folder(path)
    names = str(_attributes(main)["segments"]).split()
    for name in names:
        if not _SEGMENT_NAME.fullmatch(name):
            raise _refuse(f"it names the segment {name!r}")
        if (folder / name).resolve() != folder / name:
            raise _refuse(f"the segment {folder / name} is a symbolic link")
    allowed = {f"{folder.name}/{name}" for name in names}
    for target in _outside_files(main):
        if target not in allowed:
            raise _refuse(
                f"it points at {target!r}, which is none of its segments in {folder.name}/; was it renamed?"
            )
    return names


def _outside_files(group: Any) -> Iterator[str]:
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
                raise _refuse(f"{group.name}/{name} is a soft link")
            if depth == 0:
                child = group[name]
                if not isinstance(child, h5py.Group):
                    raise _refuse(f"{child.name} is not a group")
                pending.append((child, depth + 1))


def _child(group: Any, name: str) -> Any:
    """The object called `name` right in `group`, None if there is none; links are refused, not followed."""
    if group is None or not isinstance(group, h5py.Group) or not group.id.links.exists(name.encode()):
        return None
    if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise _refuse(f"{group.name}/{name} is a link")
    return group[name]


def _attributes(item: Any) -> dict[str, Scalar]:
    values: dict[str, Scalar] = {}
    for name in item.attrs:
        attribute = item.attrs.get_id(name)
        if attribute.shape != () or attribute.dtype.kind not in "biufS":
            raise _refuse(f"the attribute {name!r} of {item.name} is not a number or a text of fixed length")
        value = item.attrs[name].item()
        values[name] = value.decode() if isinstance(value, bytes) else value
    return values


def _read(dataset: Any, field: Field) -> Array | str:
    """A dataset as an array of its field's kind; a scalar text as str."""
    where = dataset.name
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise _refuse(f"{where} is not a plain dataset")
    if dataset.id.get_create_plist().get_nfilters():
        raise _refuse(f"{where} is compressed or filtered")
    if dataset.shape is None or dataset.dtype.kind not in ("S" if field.kind == "text" else "biuf"):
        raise _refuse(f"{where} is of type {dataset.dtype}")
    if dataset.size * dataset.dtype.itemsize > dataset.file.id.get_filesize():
        raise _refuse(f"{where} claims to be larger than its file")
    value: Any = dataset[()]
    if field.kind != "text":
        return np.asarray(value, dtype=field.kind)
    if dataset.shape == ():
        return bytes(value).decode()
    texts: list[str] = [text.decode() for text in value.flat]
    return np.asarray(texts, dtype=str).reshape(len(texts))


def _read_table(file: Any, name: str) -> dict[str, Array]:
    group = _child(file, name)
    columns: dict[str, Array] = {}
    for field in TABLES[name].values():
        dataset = _child(group, field.name)
        if dataset is not None:
            columns[field.name] = np.asarray(_read(dataset, field))
    lengths = {column.shape[:1] for column in columns.values()}
    dimensions = {name: 1 + len(field.axes) for name, field in TABLES[name].items()}
    if len(lengths) > 1 or any(column.ndim != dimensions[name] for name, column in columns.items()):
        raise _refuse(f"the columns of {name} differ in length or have a wrong number of dimensions")
    rows = lengths.pop()[0] if lengths else 0
    for field in TABLES[name].values():
        if field.name not in columns:
            columns[field.name] = np.repeat(_no_value(field), rows, axis=0)
    return columns


def _no_value(field: Field) -> Array:
    value = np.array([schema.MISSING[field.kind]], dtype="U1" if field.kind == "text" else field.kind)
    return value.reshape(1, 1) if field.axes else value


def _no_rows(field: Field) -> Array:
    return _no_value(field)[:0, :0] if field.axes else _no_value(field)[:0]


def _read_groups(file: Any, name: str) -> Iterator[tuple[str, Group]]:
    group = _child(file, name)
    if group is None:
        return
    if name not in NUMBERED:
        yield name, _read_group(group, name)
        return
    if not isinstance(group, h5py.Group):
        raise _refuse(f"{name} is not a group")
    for member in group:
        if not _MEMBER_NAME.fullmatch(member):
            raise _refuse(f"{name} has a member {member!r}")
        yield f"{name}/{member}", _read_group(_child(group, member), name)


def _read_group(group: Any, kind: str) -> Group:
    data: dict[str, Array | str] = {}
    for field in GROUPS.get(kind, {}).values():
        dataset = _child(group, field.name)
        if dataset is not None:
            data[field.name] = _read(dataset, field)
            if np.ndim(data[field.name]) != len(field.axes):
                raise _refuse(f"{dataset.name} has a wrong number of dimensions")
    return data, _attributes(group)


def _close(files: Sequence[Any]) -> None:
    for file in files:
        file.close()
