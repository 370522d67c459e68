"""Signals that come while Python still imports what a run needs, which takes seconds.

They are held back until code that can handle them is there: `launch.signals.StopSignals` and
`launch.command_runner.CommandRunner` take them over, and commands that they just end release them. It costs nothing
to import, so that it is the first thing that is done.
"""

from __future__ import annotations

import signal

_EARLY = frozenset({signal.SIGTERM, signal.SIGUSR2})
"""What `launch.stop_signals` are if nothing else is said."""

_held: set[int] = set()


def hold() -> None:
    """Holds them back, also for threads and processes that this thread starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _EARLY)
    _held.update(_EARLY - before)


def release(but: frozenset[int] = frozenset()) -> None:
    """Delivers the signals that `hold` has held back, except those in `but`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _held - but)
    _held.clear()
