"""Live progress on rank 0: one line that renews itself on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from d2ft_hpc.safe_text import one_line

_TERMINAL_SECONDS = 0.3
_FILE_SECONDS = 10.0
WORTH_TELLING = 0.1
"""Share of the steps' time that is waited for images."""


class Progress:
    """Shows steps, loss, accuracy, compute, speed and the time left; silent on other ranks.

    A log file gets a line for the first and the last step and otherwise one every 10 s at most.
    """

    def __init__(
        self, rank: int, total_steps: int, images_of_step: int, *, stream: TextIO | None = None
    ) -> None:
        self._stream = stream or sys.stdout
        self._shown = rank == 0
        self._live = self._stream.isatty()
        self._total_steps, self._images_of_step = total_steps, images_of_step
        self._accuracy = float("nan")
        self._last_shown = float("-inf")
        self._steps = 0
        self._first_ended = self._idle = self._ideal_seconds = 0.0
        self._pending = False

    def say(self, text: str) -> None:
        """A line of its own, which stays."""
        if self._shown:
            self._wipe()
            print(one_line(text), flush=True, file=self._stream)

    def evaluated(self, accuracy: float, seconds: float) -> None:
        """Sets the accuracy to show from now on; the evaluation's seconds do not count as steps."""
        self._accuracy = accuracy
        self._idle += seconds

    def is_due(self, step: int, ideal_seconds: float) -> bool:
        """Whether `step`, counted from 1, is to be shown. Call it once after every step.

        ideal_seconds: how long the step would take if it did nothing but the plan's passes.
        """
        now = time.perf_counter()
        if self._steps == 0:  # slower than the rest: planning and metering
            self._first_ended, self._idle, ideal_seconds = now, 0.0, 0.0
        self._steps += 1
        self._ideal_seconds += ideal_seconds
        every = _TERMINAL_SECONDS if self._live else _FILE_SECONDS
        due = self._shown and (now - self._last_shown >= every or step == self._total_steps)
        if due:
            self._last_shown = now
        return due

    def step(
        self,
        epoch: int,
        step: int,
        loss: float,
        learning_rate: float,
        compute: float,
        waiting_for_data: float,
    ) -> None:
        """Shows a step, counted from 1.

        compute: the plan's FLOPs over the dense ones. waiting_for_data: share of the steps' seconds so far.
        """
        trained = time.perf_counter() - self._first_ended - self._idle
        per_step = trained / (self._steps - 1) if self._steps > 1 else float("nan")
        alone = self._ideal_seconds / trained if self._steps > 1 else float("nan")
        # Above 100 % the passes became faster than they were by themselves, and no share of the step is known.
        passes = f" (forward and backward alone {alone:.0%})" if alone <= 1 else ""
        parts = [
            f"epoch {epoch}",
            f"step {step}/{self._total_steps}",
            f"loss {loss:.4f}",
            f"lr {learning_rate:.2e}",
            f"accuracy {self._accuracy:.1%}" if self._accuracy == self._accuracy else "",
            f"compute {compute:.0%} of a dense step's",
            f"{per_step:.3f} s/step{passes}  {self._images_of_step / per_step:.0f} images/s"
            if per_step == per_step
            else "",
            f"{waiting_for_data:.0%} waiting for images" if waiting_for_data >= WORTH_TELLING else "",
            f"{_clock((self._total_steps - step) * per_step)} left" if per_step == per_step else "",
        ]
        line = "  ".join(part for part in parts if part)
        if not self._live or step == self._total_steps:
            self.say(line)
            return
        self._wipe()
        print(line[: shutil.get_terminal_size().columns - 1], end="", flush=True, file=self._stream)
        self._pending = True

    def _wipe(self) -> None:
        if self._pending:
            print("\r\x1b[K", end="", file=self._stream)
            self._pending = False


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
