"""Processes that this one has started."""

from __future__ import annotations

import multiprocessing
from contextlib import suppress


def kill_children() -> None:
    """Kills the data-loader workers of a process that is about to end. They block the signals that stop a run, SIGTERM
    among them, and one that hangs in a read would outlive this process, or keep it from ending."""
    for child in multiprocessing.active_children():
        with suppress(OSError, ValueError):  # it has ended meanwhile
            child.kill()
