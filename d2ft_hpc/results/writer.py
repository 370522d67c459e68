"""Write a run's results so that a kill at any moment leaves a file that plain h5py opens.

What the run records is kept in memory; a thread puts it on disk every few seconds (`segments` says in which form), so
that training waits for no disk. `close` joins everything into one real file.
"""

import logging
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_hpc.errors import LostResultsError, ResultsError
from d2ft_hpc.results import columns, schema
from d2ft_hpc.results.hdf5_layout import Contents
from d2ft_hpc.results.reader import open_run
from d2ft_hpc.results.run_lock import lock
from d2ft_hpc.results.schema import GROUPS, TABLES, Array, Field, Group, Scalar
from d2ft_hpc.results.segments import Segments, cannot_write

_Row = dict[str, Array | str]


class ResultsWriter:
    """Writes one run's results (`schema`).

    As a context manager it closes the file at the end; after an exception it keeps everything that was
    appended and leaves the file marked incomplete.

    Args:
        path: the file to create, e.g. runs/demo/results.h5; its folder is created.
        flush_seconds: how often what was added goes to disk, in a thread; a kill loses no more than one such
            interval. 0: everything is on disk when `append` and `put` return. While the disk is full, everything is
            kept in memory and tried again.
        rank_files: how many files of single ranks hold the columns with a rank axis; 0: this file holds them.

    Raises:
        ResultsError: the file exists, another process writes it, or it cannot be written.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        flush_seconds: float = 5.0,
        rank_files: int = 0,
    ) -> None:
        path = Path(path).absolute()
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._files = Segments(path, created=now, rank_files=rank_files)
        if path.exists() or any(self._files.folder.glob("*.h5")):
            raise ResultsError(
                f"{path} (or {self._files.folder.name}/ beside it) exists and is not overwritten: "
                "resume that run, remove it, or choose another output folder"
            )
        self._start(flush_seconds)
        self._files.write_links()

    @classmethod
    def resume(
        cls,
        path: Path | str,
        *,
        last_step: int,
        flush_seconds: float = 5.0,
        rank_files: int = 0,
    ) -> "ResultsWriter":
        """Continue an existing file, whether its run was killed or ended in order.

        Table rows of steps after `last_step` (the last step in the checkpoint that the run resumes from) are
        dropped. Static groups stay; `put` replaces those of the same name.

        Raises:
            LostResultsError: the file is missing, damaged or not ours.
            ResultsError: it was begun otherwise, another process writes it, or it cannot be written.
        """
        try:
            with open_run(path) as run:
                had_rank_files, created, path = run.rank_files, run.created, run.path
                tables, groups = run.contents()
        except ResultsError as error:
            raise LostResultsError(str(error)) from error
        if bool(had_rank_files) != bool(rank_files):
            raise ResultsError(
                f"{path} was begun with{'' if had_rank_files else 'out'} a file for each rank: "
                "resume it in the same way (results.file_per_rank)"
            )
        writer = cls.__new__(cls)
        writer._files = Segments(path, created=created, rank_files=rank_files)
        for name, table in tables.items():
            if table:
                # Evaluations and events are numbered by the steps done before them.
                keep = table["step"] <= last_step + (name in ("evaluations", "events"))
                tables[name] = {column: values[keep] for column, values in table.items()}
        if rank_files:
            tables["steps"] = {
                name: column for name, column in tables["steps"].items() if name not in schema.RANK_FIELDS
            }
        writer._start(flush_seconds)
        stale = list(writer._files.folder.glob("*.h5"))
        writer._files.add(Contents(tables, groups), replace=True)
        for file in stale:
            file.unlink(missing_ok=True)
        return writer

    def _start(self, flush_seconds: float) -> None:
        self.path = self._files.path
        self._rows: dict[str, list[_Row]] = {table: [] for table in TABLES}
        self._groups: dict[str, Group] = {}
        self._closed = False
        self._adding, self._flushing = threading.Lock(), threading.Lock()
        try:
            self._files.folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise cannot_write(self.path, fault) from fault
        self._lock = lock(self.path)
        self._flush_seconds = flush_seconds
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._flush_often, name="results", daemon=True)
        if flush_seconds > 0:
            self._thread.start()

    def put(
        self,
        group: str,
        data: Mapping[str, Array | int | float | str | Sequence[str]],
        attrs: Mapping[str, Scalar] | None = None,
    ) -> None:
        """Store a static group ("config", "environment", "model"); replaces one of the same name.

        Args:
            group: a name of `schema.GROUPS`.
            data: the group's datasets; names, kinds and units are those of the schema.
            attrs: numbers and texts.

        Raises:
            ResultsError: the schema has no such group or dataset, or a value does not fit.
        """
        self._check_open()
        if group not in GROUPS:
            raise ResultsError(f"results have no group {group!r}: {schema.nearest(group, GROUPS)}")
        datasets: dict[str, Array | str] = {}
        for name, value in data.items():
            if name not in GROUPS[group]:
                raise ResultsError(f"results have no {group}/{name}: {schema.nearest(name, GROUPS[group])}")
            datasets[name] = _checked(f"{group}/{name}", value, GROUPS[group][name])
        attributes = {
            name: _checked_attribute(f"{group}@{name}", value) for name, value in (attrs or {}).items()
        }
        with self._adding:
            self._groups[group] = (datasets, attributes)
        self._flush_now_if_asked()

    def append(self, table: str, row: Mapping[str, Scalar | Array]) -> None:
        """Add a row to the table "steps", "evaluations", "events", "plans" or "scores".

        Args:
            table: a name of `schema.TABLES`.
            row: values by column: a number or text, or an array with the column's axes, such as one number a rank,
                [world_size]. `step` is required; other columns that are left out are stored as missing.

        Raises:
            ResultsError: the schema has no such table or column, or a value does not fit.
        """
        self._check_open()
        if table not in TABLES:
            raise ResultsError(f"results have no table {table!r}: {schema.nearest(table, TABLES)}")
        if "step" not in row:
            raise ResultsError(f"a row of {table} has no `step`: every row needs one")
        values: _Row = {}
        widths = {}
        for name, value in row.items():
            if name not in TABLES[table]:
                raise ResultsError(f"{table} has no column {name!r}: {schema.nearest(name, TABLES[table])}")
            field = TABLES[table][name]
            checked = values[name] = _checked(f"{table}.{name}", value, field)
            if field.axes == ("rank",):
                widths[name] = len(checked)
        if len(set(widths.values())) > 1:
            raise ResultsError(f"the per-rank columns of a row of {table} have different lengths: {widths}")
        with self._adding:
            self._rows[table].append(values)
        self._flush_now_if_asked()

    def flush(self) -> None:
        """Put everything added so far on disk now.

        Raises:
            ResultsError: the disk is full or cannot be written; what was on disk before still opens, and the
                next flush tries again with all that is missing.
        """
        self._check_open()
        with self._flushing:
            with self._adding:
                rows, self._rows = self._rows, {table: [] for table in TABLES}
                groups, self._groups = self._groups, {}
            if not groups and not any(rows.values()):
                return
            try:
                self._files.add(
                    Contents({table: columns.stack(table, rows[table]) for table in TABLES}, groups)
                )
            except BaseException:
                with self._adding:
                    self._rows = {table: [*rows[table], *self._rows[table]] for table in TABLES}
                    self._groups = {**groups, **self._groups}
                raise

    def close(self, *, complete: bool = True) -> None:
        """Flush, join everything into one file, and remove the segments. A second call does nothing.

        Args:
            complete: whether the run ended in order.

        Raises:
            ResultsError: the disk is full or cannot be written; what was on disk before still opens.
        """
        if self._closed:
            return
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        self.flush()
        self._files.join(complete=complete)
        self._closed = True
        self._release()
        shutil.rmtree(self._files.folder, ignore_errors=True)

    def __enter__(self) -> "ResultsWriter":
        return self

    def __exit__(self, kind: object, fault: BaseException | None, trace: object) -> None:
        if fault is None:
            self.close()
            return
        try:
            self.close(complete=False)
        except ResultsError as second:  # the first fault is the one to report
            self._release()
            if not isinstance(fault, ResultsError):
                logging.getLogger(__name__).error("%s", second)

    def _flush_often(self) -> None:
        refused = False
        while not self._ending.wait(self._flush_seconds):
            try:
                self.flush()
                refused = False
            except Exception as fault:  # whatever it is, the next flush may succeed, and `close` reports it
                if not refused:
                    logging.getLogger(__name__).warning("%s (kept in memory, tried again)", fault)
                refused = True

    def _flush_now_if_asked(self) -> None:
        if self._flush_seconds == 0:
            self.flush()

    def _check_open(self) -> None:
        if self._closed:
            raise ResultsError(f"{self.path} is closed: nothing can be added to it")

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _clean(text: str) -> str:
    """Text that HDF5 can hold: valid UTF-8 without NUL."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _checked(name: str, value: Any, field: Field) -> Array | str:
    if field.kind == "text":
        if not field.axes:
            return _clean(str(value))
        return np.array([_clean(str(text)) for text in value], dtype=str)
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
