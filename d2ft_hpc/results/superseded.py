"""The record of a run that begins or goes on, whatever there is of an older one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from d2ft_hpc.errors import LostResultsError, ResultsError
from d2ft_hpc.results.hdf5_layout import segments_folder
from d2ft_hpc.results.reader import open_run
from d2ft_hpc.results.run_lock import lock
from d2ft_hpc.results.segments import cannot_write
from d2ft_hpc.results.writer import ResultsWriter

BEFORE_ALL = -2
"""Value for the last step that is kept if nothing is, not even the evaluation before the first step."""


def open_record(path: Path, last_step: int | None, *, rank_files: int = 0) -> tuple[ResultsWriter, str]:
    """The writer of a run that goes on after `last_step`, or of one that begins (None), which takes the place of a run
    that never began a step. Where the record to go on with is lost, a new one begins, and the text says so.

    rank_files: as `ResultsWriter` takes it. Raises ResultsError.
    """
    if last_step in (None, BEFORE_ALL) and is_unbegun(path):
        discard(path)
        last_step = None
    if last_step is None:
        return ResultsWriter(path, rank_files=rank_files), ""
    try:
        return ResultsWriter.resume(path, last_step=last_step, rank_files=rank_files), ""
    except LostResultsError as error:
        left = set_aside(path)
        lost = f"the record of the first {max(last_step + 1, 0)} steps is gone ({error})"
        lost += "" if left is None else f"; what is left of it is in {left}"
        return ResultsWriter(path, rank_files=rank_files), lost


def has_record(path: Path) -> bool:
    """Whether there is a results file or a part of one."""
    return path.exists() or any(segments_folder(path).glob("*.h5"))


def is_unbegun(path: Path) -> bool:
    """Whether the file is of a run that ended before its first step."""
    try:
        with open_run(path) as run:
            return not run.complete and not len(run.table("steps", ["step"])["step"])
    except ResultsError:
        return False


def set_aside(path: Path) -> Path | None:
    """Moves a results file and its segments, as far as they exist, into a new folder beside it and returns that
    folder; None if there is nothing. Raises ResultsError if another process writes it, or the folder cannot be
    written."""
    segments = segments_folder(path)
    left = [part for part in (path, segments) if part.exists()]
    if not left:
        return None
    held = lock(path) if segments.exists() else None
    try:
        number = 1
        while (target := path.with_name(f"{path.stem}.lost-{number}")).exists():
            number += 1
        target.mkdir()
        for part in left:
            os.replace(part, target / part.name)
    except OSError as fault:
        raise cannot_write(path, fault) from fault
    finally:
        if held is not None:
            os.close(held)
    return target


def discard(path: Path) -> None:
    """Removes what `set_aside` moves; raises as it does."""
    if (moved := set_aside(path)) is not None:
        shutil.rmtree(moved, ignore_errors=True)
