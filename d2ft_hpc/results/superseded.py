"""Results files that a new record of their run takes the place of."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from d2ft_hpc.errors import ResultsError
from d2ft_hpc.results.hdf5_layout import segments_folder
from d2ft_hpc.results.reader import open_run
from d2ft_hpc.results.segments import cannot_write
from d2ft_hpc.results.writer import Locking, lock


def has_record(path: Path) -> bool:
    """Whether there is a results file, or anything of one."""
    return path.exists() or any(segments_folder(path).glob("*.h5"))


def is_unbegun(path: Path) -> bool:
    """Whether the file is of a run that ended before its first step."""
    try:
        with open_run(path) as run:
            return not run.complete and not len(run.table("steps", ["step"])["step"])
    except ResultsError:
        return False


def set_aside(path: Path, locking: Locking) -> Path | None:
    """Moves what there is of a results file and its segments into a new folder beside it, which is returned; None if
    there is nothing. Raises ResultsError if another process writes it, or the folder cannot be written."""
    segments = segments_folder(path)
    left = [part for part in (path, segments) if part.exists()]
    if not left:
        return None
    held = lock(segments / "lock", locking) if segments.exists() else None
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


def discard(path: Path, locking: Locking) -> None:
    """Removes what `set_aside` moves; raises as it does."""
    if (moved := set_aside(path, locking)) is not None:
        shutil.rmtree(moved, ignore_errors=True)
