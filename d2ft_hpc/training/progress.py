"""Live progress: plain lines on rank 0, so that a terminal, `mpirun` and a log file all show the same."""

from __future__ import annotations

import sys
import time


class Progress:
    """Prints at most one step line every `every_seconds`; silent on other ranks."""

    def __init__(self, rank: int, total_steps: int, every_seconds: float = 2.0) -> None:
        self._shown = rank == 0
        self._total_steps = total_steps
        self._every_seconds = every_seconds
        self._last = float("-inf")
        self._steps = 0
        self._first_ended = 0.0

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._shown:
            print(text, flush=True, file=sys.stdout)

    def step(self, epoch: int, step: int, loss: float, learning_rate: float, compute_share: float) -> None:
        """One optimiser step is done. `compute_share` is the plan's FLOPs over the dense ones."""
        now = time.perf_counter()
        if self._steps == 0:  # slower than the rest: planning and metering
            self._first_ended = now
        self._steps += 1
        if now - self._last < self._every_seconds and step != self._total_steps:
            return
        self._last = now
        seconds_per_step = (now - self._first_ended) / max(self._steps - 1, 1)
        remaining = round((self._total_steps - step) * seconds_per_step)
        self.say(
            f"epoch {epoch:3d}  step {step:5d}/{self._total_steps}  loss {loss:7.4f}  lr {learning_rate:.2e}  "
            f"compute {compute_share:4.0%}  {seconds_per_step:6.3f} s/step  {remaining // 60}:{remaining % 60:02d} left"
        )
