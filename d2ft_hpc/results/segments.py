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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py

import d2ft_hpc
from d2ft_hpc.errors import ResultsError
from d2ft_hpc.files import atomic
from d2ft_hpc.files.untrusted import RefusedError
from d2ft_hpc.results import columns
from d2ft_hpc.results.hdf5_layout import (
    FORMAT_VERSIONS,
    Contents,
    Segment,
    attach_scales,
    create,
    describe,
    encode,
    joined_shape,
    link_column,
    link_rank_files,
    nbytes_of,
    rows_of,
    segments_folder,
    set_attributes,
    stored,
    write_group,
)
from d2ft_hpc.results.schema import (
    FORMAT,
    RANK_FIELDS,
    SCHEMA_VERSION,
    TABLES,
    Field,
    Scalar,
)
from d2ft_hpc.results.untrusted import read_groups, read_table

_GRACE_SECONDS = 10.0
"""Seconds that a merged segment stays on disk for readers that opened an older linking file."""
_LARGE_SEGMENT_BYTES = 64 * 2**20
"""Segments of this size are not merged any more."""


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
        nbytes = nbytes_of(fresh)
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
        segment = describe(f"{self._sequence:08d}.h5", fresh)
        file = self.folder / segment.name
        write_atomically(file, encode(fresh, self._attributes(complete=False)))
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
        with h5py.File(image, "w", libver=FORMAT_VERSIONS) as file:
            set_attributes(file, attributes)
            for group, field in self._columns(file):
                link_column(group, field, segments, self.folder.name)
            newest = {group: segment.name for segment in segments for group in segment.groups}
            for name, source in newest.items():
                file[name] = h5py.ExternalLink(f"{self.folder.name}/{source}", name)
            attach_scales(file, self.rank_files)
        write_atomically(self.path, image.getbuffer())

    def join(self, *, complete: bool) -> None:
        """Make `path` one real, compressed file.

        It is built in memory, because HDF5 does not recover from a full disk.
        """
        self._remove_superseded(float("inf"))  # the joined file needs the room
        image = io.BytesIO()
        with (
            self._opened(self._segments) as files,
            h5py.File(image, "w", libver=FORMAT_VERSIONS) as whole,
        ):
            set_attributes(whole, self._attributes(complete))
            for group, field in self._columns(whole):
                self._join_column(group, field, files)
            for name, contents in {n: g for file in files for n, g in read_groups(file)}.items():
                write_group(whole, name, contents)
            attach_scales(whole, self.rank_files)
        write_atomically(self.path, image.getbuffer())

    def _columns(self, file: Any) -> Iterator[tuple[Any, Field]]:
        """Makes the tables' groups, and the columns that lie in the ranks' files; yields the others, to be made."""
        for table, fields in TABLES.items():
            group = file.create_group(table)
            for field in fields.values():
                if table == "steps" and field.name in RANK_FIELDS and self.rank_files:
                    link_rank_files(group, field, self.path, self.rank_files)
                else:
                    yield group, field

    def _join_column(self, group: Any, field: Field, files: Sequence[Any]) -> None:
        path = f"{group.name.strip('/')}/{field.name}"
        shape, dtype = joined_shape(path, field, self._segments)
        if shape is None:
            return
        target = create(group, field, shape, dtype)
        start = 0
        for segment, file in zip(self._segments, files, strict=True):
            rows = rows_of(segment, path)
            if path in segment.columns and rows:
                part = read_table(file, path.split("/")[0], [field.name])[field.name]
                target[start : start + rows] = stored(columns.fit(part, shape[1:], field))
            start += rows

    @contextmanager
    def _opened(self, segments: Sequence[Segment]) -> Iterator[list[Any]]:
        try:
            with ExitStack() as stack:
                paths = [self.folder / segment.name for segment in segments]
                yield [stack.enter_context(h5py.File(path, "r", locking=False)) for path in paths]
        except (OSError, RefusedError) as fault:
            raise ResultsError(
                f"cannot read back {self.folder}: {fault}; leave that folder alone while the run goes on"
            ) from fault

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


def write_atomically(path: Path, image: bytes | memoryview) -> None:
    """Make `image` the content of `path`; a kill or a fault leaves all of the old content."""
    try:
        atomic.write(path, image)
    except OSError as fault:
        raise cannot_write(path, fault) from fault


def cannot_write(path: Path, fault: OSError) -> ResultsError:
    """The message for a fault of the file system."""
    if fault.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free space (or quota) there, or choose an output folder on another file system"
    else:
        fix = "choose an output folder that this user can write to"
    return ResultsError(f"cannot write results to {path}: {os.strerror(fault.errno or 0)}; {fix}")
