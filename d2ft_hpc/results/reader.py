"""Open a run's results: during the run, after a kill, or years later.

The segments of a run that goes on, and the files of single ranks, are opened by name in the run's own folders; HDF5
never follows a link or a virtual dataset.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from d2ft_hpc.config_file import parse_values
from d2ft_hpc.errors import ResultsError
from d2ft_hpc.files.hdf5 import Allowance, child, open_file, read_attributes, reason
from d2ft_hpc.files.untrusted import RefusedError
from d2ft_hpc.results import columns, frames, schema
from d2ft_hpc.results.hdf5_layout import Contents, rank_file, segments_folder
from d2ft_hpc.results.run_lock import is_locked
from d2ft_hpc.results.schema import GROUPS, RANK_FIELDS, TABLES, Array, Group, Scalar, Table
from d2ft_hpc.results.untrusted import check_root, outside_files, read_group, read_groups, read_table
from d2ft_hpc.safe_text import one_line

if TYPE_CHECKING:
    import pandas
    import xarray

_SEGMENT_NAME = re.compile(r"\d{8}\.h5")
_ATTEMPTS = 5
_MOST_RANK_FILES = 1 << 20


def open_run(path: Path | str) -> "RunResults":
    """Open a results file, or the `results.h5` of a run folder, for reading; also while the run writes it.

    Raises:
        ResultsError: there is no such file, it is damaged, or it is not a results file of this package.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "results.h5"
    if not path.is_file():
        raise ResultsError(f"no results file at {path}: {_where_there_is_one(path)}")
    return _open(path.resolve(), rank_files=True)


def _where_there_is_one(absent: Path) -> str:
    """What to give in place of a results file that is not there."""
    folder, file = absent.parent, "results.h5"
    if absent.name == file and (runs := sorted(folder.glob(f"*/{file}"))):
        found = "is a run folder" if len(runs) == 1 else f"and {len(runs) - 1} more are run folders"
        return f"{runs[0].parent} {found}; give those that you mean, or {folder / '*'}/"
    if (folder / file).is_file():
        return f"{folder} is a run folder; give that"
    return "give the path of a run folder or of its results.h5"


def _open(path: Path, *, rank_files: bool) -> "RunResults":
    """rank_files: whether the file may belong to a run with a file for each rank. A rank's own file may not."""
    with _faults_of(path):
        for _ in range(_ATTEMPTS - 1):
            with suppress(
                FileNotFoundError
            ):  # merged into another by the writer since the linking file was read
                return _opened(path, rank_files)
        return _opened(path, rank_files)


def _opened(path: Path, rank_files: bool) -> "RunResults":
    with ExitStack() as stack:
        main = stack.enter_context(open_file(path))
        check_root(main)
        attributes = read_attributes(main)
        files = [main]
        if "segments" in attributes:
            names = _segment_names(main, path, attributes)
            files = [stack.enter_context(open_file(segments_folder(path) / name)) for name in names]
            for file in files:
                check_root(file)
        of_ranks = attributes.get("rank_files", 0)
        if not isinstance(of_ranks, int) or not 0 <= of_ranks <= rank_files * _MOST_RANK_FILES:
            raise RefusedError(f"its `rank_files` is {of_ranks!r}")
        ranks = [run and stack.enter_context(run) for run in _open_rank_files(path, of_ranks)]
        return RunResults(path, attributes, files, ranks, stack.pop_all())


class RunResults:
    """An open results file. It shows the run as it was when opened; use it in a `with` block or `close` it.

    Attributes:
        path: the file.
        complete: the run ended in order (false while it goes on, and after a kill or an error).
        created: start of the run, UTC, ISO 8601.
        package_version: version of the package that wrote the file.
        rank_files: how many files of single ranks belong to the run; 0 if this one holds everything.
    """

    def __init__(
        self,
        path: Path,
        attributes: dict[str, Scalar],
        files: Sequence[Any],
        ranks: Sequence["RunResults | None"],
        opened: ExitStack,
    ) -> None:
        """attributes: of the file's root. opened: what is to be closed."""
        self.path, self._files, self._ranks, self._opened = path, files, ranks, opened
        self.complete = bool(attributes.get("complete", False))
        self.created = str(attributes.get("created", ""))
        self.package_version = str(attributes.get("package_version", ""))
        self.rank_files = len(ranks)

    @property
    def goes_on(self) -> bool:
        """Whether a process writes the run now; false where its lock cannot be seen."""
        return not self.complete and is_locked(self.path)

    @property
    def config(self) -> Any:
        """The run's resolved configuration as plain dicts, lists and scalars ({} if none was stored)."""
        with _faults_of(self.path):
            text = str(self.datasets("config").get("yaml", ""))
            return parse_values(text) if text.strip() else {}

    def table(self, name: str, only: Collection[str] | None = None) -> Table:
        """Columns of a table by name, each [row] or [row, *axes] (see `schema`), or only the named ones.

        Columns that the run did not record say "missing".
        """
        if name not in TABLES:
            raise ResultsError(f"{self.path} has no table {name!r}: {schema.nearest(name, TABLES)}")
        for column in only or ():
            self._field(name, column)
        with _faults_of(self.path):
            allowance = self._allowance()
            whole = columns.complete(name, self._read_recorded(name, only, allowance), only, allowance)
            return whole if only is None else {column: whole[column] for column in only}

    def plan(self, index: int) -> Array:
        """The operations of one plan, uint8 [row, block, head]: 0 SHORTCUT, 1 FORWARD_ONLY, 2 FULL."""
        return self._unpadded("plans", "operations", index)

    def score(self, index: int, name: Literal["forward", "backward"]) -> Array:
        """One measurement of the scores, float32 [row, block, head]."""
        return self._unpadded("scores", name, index)

    def datasets(self, group: str) -> dict[str, Array | str]:
        """The datasets of "config" or "model" ({} if there is no such group)."""
        with _faults_of(self.path):
            return self._group(group)[0]

    def attributes(self, group: str) -> dict[str, Scalar]:
        """The attributes of a static group, e.g. "model" ({} if there is none)."""
        with _faults_of(self.path):
            return self._group(group)[1]

    def units(self, table: str, column: str) -> str:
        """The unit of a column as the file gives it ("1" for pure numbers)."""
        field = self._field(table, column)
        with _faults_of(self.path):
            for file in self._files:
                dataset = child(child(file, table), column)
                if dataset is not None:
                    return str(read_attributes(dataset).get("units", field.units))
        return field.units

    def elapsed_seconds(self, steps: Array) -> Array:
        """Measured training time before each of `steps` (counted from 0), float64 [len(steps)], in seconds.

        Counts what everybody waits for: the slowest rank of every step, and scoring and planning done so far.
        `elapsed_seconds([n])` is the time of the first n steps.
        """
        table = self.table("steps", ["step", "step_seconds"])
        scores = self.table("scores", ["step", "seconds"])
        plans = self.table("plans", ["step", "solve_seconds"])
        # Scores and plans count between the step before them and the step that they are for.
        when = np.concatenate([table["step"] + 0.5, scores["step"] + 0.25, plans["step"] + 0.25])
        seconds = np.concatenate([slowest(table["step_seconds"]), scores["seconds"], plans["solve_seconds"]])
        order = np.argsort(when, kind="stable")
        total = np.concatenate([[0.0], np.nancumsum(seconds[order])])
        return np.asarray(total[np.searchsorted(when[order], steps, side="left")])

    def pandas(self, table: str, *, by_rank: bool = False) -> "pandas.DataFrame":
        """A table as a pandas.DataFrame. Needs pandas (`pip install 'd2ft-hpc[analysis]'`).

        by_rank: the per-rank columns, one row for each pair of row and rank; else the columns of single numbers and
        texts, one row for each row.
        """
        return frames.to_pandas(self.table(table), table, by_rank=by_rank)

    def xarray(self, table: str) -> "xarray.Dataset":
        """A table as an xarray.Dataset with named axes and units. Needs xarray (`pip install 'd2ft-hpc[analysis]'`)."""
        return frames.to_xarray(self.table(table), table)

    def contents(self) -> Contents:
        """All that was recorded in the file."""
        with _faults_of(self.path):
            groups = {name: group for file in self._files for name, group in read_groups(file)}
            tables = {name: self._read_recorded(name, None, self._allowance()) for name in TABLES}
            return Contents(tables, groups)

    def close(self) -> None:
        """Close the underlying files."""
        self._opened.close()

    def __enter__(self) -> "RunResults":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _field(self, table: str, column: str) -> schema.Field:
        field = TABLES.get(table, {}).get(column)
        if field is None:
            name, known = f"{table}.{column}", (f"{t}.{c}" for t in TABLES for c in TABLES[t])
            raise ResultsError(f"{self.path} has no column {name}: {schema.nearest(name, known)}")
        return field

    def _allowance(self) -> Allowance:
        """For one table."""
        of_ranks = [file for run in self._ranks if run is not None for file in run._files]
        return Allowance(sum(file.id.get_filesize() for file in (*self._files, *of_ranks)))

    def _read_recorded(self, name: str, only: Collection[str] | None, allowance: Allowance) -> Table:
        anchor = None if only is None else {*only, "step"}
        if name == "steps" and self._ranks:
            return self._join_ranks(anchor, allowance)
        parts = [read_table(file, name, anchor, allowance) for file in self._files]
        recorded = columns.join(name, parts, allowance)
        if recorded and "step" not in recorded:
            raise RefusedError(f"{name} has no column step")
        return recorded

    def _join_ranks(self, only: Collection[str] | None, allowance: Allowance) -> Table:
        """The steps of a run with a file for each rank; a rank's rows are found by their step."""
        shared = {
            name for name in TABLES["steps"] if name not in RANK_FIELDS and (only is None or name in only)
        }
        parts = [read_table(file, "steps", {*shared, "step"}, allowance) for file in self._files]
        joined = columns.join("steps", parts, allowance)
        joined.setdefault("step", np.empty(0, np.int64))
        rows = columns.length(joined)
        for rank, run in enumerate(self._ranks):
            own = {} if run is None else run._read_recorded("steps", only, allowance)
            if not own:
                continue
            _, here, there = np.intersect1d(joined["step"], own["step"], return_indices=True)
            for name in own.keys() & RANK_FIELDS.keys():
                if name not in joined:
                    shape = (rows, len(self._ranks))
                    joined[name] = columns.missing(RANK_FIELDS[name], shape, allowance)
                if own[name].shape[1] != 1:
                    raise RefusedError(f"the file of rank {rank} has steps of {own[name].shape[1]} ranks")
                joined[name][here, rank] = own[name][there, 0]
        if "rank_loss" in joined:
            known = np.isfinite(joined["rank_loss"])
            count = known.sum(axis=1)
            total = np.where(known, joined["rank_loss"], 0).sum(axis=1)
            joined["loss"] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        if "rank_samples" in joined:
            joined["samples"] = np.maximum(joined["rank_samples"], 0).sum(axis=1, dtype=np.int64)
        if "communication_seconds" in joined:
            joined["waiting_seconds"] = waiting(joined["communication_seconds"])
        return joined

    def _unpadded(self, table: str, column: str, index: int) -> Array:
        values = self.table(table, [column])[column]
        if not -len(values) <= index < len(values):
            raise ResultsError(f"{self.path} has {len(values)} {table}, asked for {index}")
        chosen = values[index]
        absent = chosen == schema.MISSING["uint8"] if table == "plans" else np.isnan(chosen)
        rows, blocks, heads = (int((~absent).any(axis=axes).sum()) for axes in ((1, 2), (0, 2), (0, 1)))
        return np.asarray(chosen[:rows, :blocks, :heads])

    def _group(self, name: str) -> Group:
        if name not in GROUPS:
            raise ResultsError(f"{self.path} has no group {name!r}: {schema.nearest(name, GROUPS)}")
        for file in reversed(self._files):
            found = child(file, name)
            if found is not None:
                return read_group(found, name)
        return {}, {}


def slowest(seconds: Array) -> Array:
    """The slowest rank's seconds of each row, [row, rank] -> [row]; 0 where no rank has a measurement."""
    if seconds.shape[1] == 0:
        return np.zeros(len(seconds))
    return np.asarray(np.nan_to_num(np.fmax.reduce(seconds.astype(np.float64), axis=1)))


def waiting(communication: Array) -> Array:
    """Seconds that each rank waited for slower ones, [row, rank]: how much longer it was held up than the rank that
    was held up least."""
    if communication.shape[1] == 0:
        return communication
    return np.asarray(communication - np.fmin.reduce(communication, axis=1)[:, None])


def _open_rank_files(path: Path, ranks: int) -> Iterator[RunResults | None]:
    """The results of each rank; None for a rank that wrote none, as when the run was killed early."""
    folder = rank_file(path, 0).parent
    if folder.resolve() != folder:
        raise RefusedError(f"{folder} is a symbolic link")
    for file in (rank_file(path, rank) for rank in range(ranks)):
        if file.is_symlink():
            raise RefusedError(f"{file} is a symbolic link")
        yield _open(file, rank_files=False) if file.is_file() else None


@contextmanager
def _faults_of(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or hostile file provokes in the libraries below into one message."""
    try:
        yield
    except ResultsError as fault:
        text = str(fault)
        raise ResultsError(
            one_line(text) if text.startswith("cannot read") else f"cannot read {path}: {one_line(text)}"
        ) from fault
    except RefusedError as fault:
        raise ResultsError(
            f"cannot read {path}: not a results file of this package, or damaged ({one_line(str(fault))}); "
            "restore it from a copy"
        ) from fault
    except ImportError:
        raise
    except FileNotFoundError as fault:
        raise ResultsError(
            f"cannot read {path}: {fault.filename} is missing; a run that has not ended keeps its data in "
            f"{segments_folder(path).name}/ beside the file: copy or move both together"
        ) from fault
    except PermissionError as fault:
        raise ResultsError(f"cannot read {path}: permission denied; ask its owner for read access") from fault
    except Exception as fault:
        raise ResultsError(
            f"cannot read {path}: damaged or not an HDF5 file ({one_line(reason(fault))}); give a run's folder or its "
            "results.h5, or restore that from a copy"
        ) from fault


def _segment_names(main: Any, path: Path, attributes: dict[str, Scalar]) -> list[str]:
    """The segments of a linking file, after checking that it points at nothing else."""
    folder = segments_folder(path)
    names = str(attributes["segments"]).split()
    if len(set(names)) < len(names):
        raise RefusedError("it names a segment twice")
    for name in names:
        if not _SEGMENT_NAME.fullmatch(name):
            raise RefusedError(f"it names the segment {name!r}")
        if (folder / name).resolve() != folder / name:
            raise RefusedError(f"the segment {folder / name} is a symbolic link")
    allowed = {f"{folder.name}/{name}" for name in names}
    for target in outside_files(main):
        if target not in allowed:
            raise RefusedError(
                f"it points at {target!r}, which is none of its segments in {folder.name}/; was it renamed?"
            )
    return names
