"""One command after another, each a process of its own that hears the signals that this one gets."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType

from d2ft_hpc import early_signals
from d2ft_hpc.errors import UNFINISHED
from d2ft_hpc.launch.control import GRACE_SECONDS
from d2ft_hpc.launch.signals import number_of


class CommandRunner:
    """Starts commands and passes stop signals on to the one that runs; made in the main thread.

    names: of all signals that stop one of them, such as ["USR2", "TERM"]. Raises ConfigError for one that there is not.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._numbers = {number_of(name) for name in names}
        self._running: subprocess.Popen[bytes] | None = None
        self.stopped = False
        """Whether such a signal has come, so that no further command may be started."""
        for number in self._numbers:
            signal.signal(number, self._pass_on)
        early_signals.release()

    def run(self, command: Sequence[str], names: Sequence[str]) -> int:
        """Runs the command and returns its exit status; `UNFINISHED` where a stop signal ended it before it listened.
        names: of the signals that stop it.
        """
        # A signal that comes now waits until there is somebody to pass it on to. The command begins with it blocked, as
        # it means to: one that it gets before it listens is not lost either.
        numbers = {number_of(name) for name in names}
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        try:
            self._running = subprocess.Popen(command, preexec_fn=_follow_parent(os.getpid()))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        status = self._wait(self._running)
        return UNFINISHED if -status in self._numbers else status

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        try:
            return child.wait()
        except KeyboardInterrupt:
            # A terminal interrupts the child as well; `kill -INT` of this process does not.
            with suppress(subprocess.TimeoutExpired):
                return child.wait(GRACE_SECONDS)
            child.send_signal(signal.SIGINT)
            return child.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._running is not None:
            self._running.send_signal(number)


def _follow_parent(parent: int) -> Callable[[], None]:
    """A function for the child to call before it becomes the command: it makes the system send the child SIGTERM when
    this process is gone, perhaps killed, since nobody would wait for the child or pass signals on any more.
    """
    prctl = ctypes.CDLL(None).prctl

    def follow() -> None:
        prctl(_SEND_AT_PARENTS_END, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it ended in between
            os.kill(os.getpid(), signal.SIGTERM)

    return follow


_SEND_AT_PARENTS_END = 1
"""PR_SET_PDEATHSIG of Linux."""
