"""The lock that keeps a second process off a run whose results are being written. Readers need none."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from d2ft_hpc.errors import ResultsError
from d2ft_hpc.results.hdf5_layout import segments_folder

_LOOK_SECONDS = 0.1
"""Longer than `is_locked` of another process holds the lock."""


def lock(results: Path) -> int | None:
    """An exclusive lock, which ends with this process: its file descriptor, None where the file system has no locks.
    The folder of the results' segments exists.

    Raises ResultsError if another process holds it.
    """
    try:
        descriptor = os.open(_lock_file(results), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOOK_SECONDS)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError as fault:
        with suppress(OSError):
            os.close(descriptor)
        if isinstance(fault, BlockingIOError):
            raise _locked(results) from None
        return None


def is_locked(results: Path) -> bool:
    """Whether a process writes these results; False where locks cannot be seen."""
    try:
        descriptor = os.open(_lock_file(results), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as fault:
        return isinstance(fault, BlockingIOError)
    finally:
        with suppress(OSError):
            os.close(descriptor)


def check_unlocked(results: Path) -> None:
    """Raises ResultsError, as `lock` does, where a process writes these results."""
    if is_locked(results):
        raise _locked(results)


def _lock_file(results: Path) -> Path:
    return segments_folder(results) / "lock"


def _locked(results: Path) -> ResultsError:
    return ResultsError(
        f"another process writes this run ({_lock_file(results)} is locked): wait for it to end, choose another "
        f"folder (run.name, or results= in a loop of your own), or remove that file if no such process is left on any "
        f"node"
    )
