"""Signals that ask a run to stop: noticed at once, acted upon at a step boundary (`watch`)."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from multiprocessing import resource_tracker

from d2ft_hpc import early_signals
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.safe_text import shown

INTERRUPT = "INT"


class StopSignals:
    """Catches signals from the moment it is made, so that one that comes during start-up is not lost.

    The interpreter's own C handler writes each signal's number to a pipe: this works while the main thread is
    inside a collective, where no Python handler would run. Make it in the main thread, which blocks the signals, as
    do all threads and processes that it starts: launchers signal data-loader workers too, and these must live on. The
    one thread that calls `receive_here` gets the signals.

    names: such as ["USR2", "TERM"]. Raises ConfigError for one that the system does not have or cannot catch.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._numbers = {number_of(name): name for name in names}
        self._blocked = frozenset[int](self._numbers)
        self._reading, writing = os.pipe()
        os.set_blocking(self._reading, False)
        os.set_blocking(writing, False)
        self._numbers.setdefault(signal.SIGINT, INTERRUPT)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in self._blocked:
            signal.signal(number, lambda *_: None)  # a handler must exist for the pipe to be written
        # Python starts this process before its first worker. It starts now, and so has the signals blocked, too; and as
        # up to 3.12 that lets SIGTERM through to this thread, and so to the workers, it is blocked again.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)
        early_signals.release(but=self._blocked)

    def receive_here(self) -> None:
        """Lets the calling thread get the signals."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._blocked)

    def fileno(self) -> int:
        """Readable when a signal has come."""
        return self._reading

    def caught(self) -> str | None:
        """The name of a signal that came since the last call, also INT for Ctrl-C; None if there was none."""
        try:
            numbers = os.read(self._reading, 512)
        except BlockingIOError:
            return None
        return next((self._numbers[number] for number in reversed(numbers) if number in self._numbers), None)


def number_of(name: str) -> int:
    """The number of a signal by its name without SIG. Raises ConfigError."""
    number = signal.Signals.__members__.get(f"SIG{name}")
    if number is None or number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGINT):
        raise ConfigError(
            f"launch.stop_signals: {shown(name)} is no signal that can be caught; use names such as USR1, USR2, TERM"
        )
    return int(number)
