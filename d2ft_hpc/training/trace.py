"""A trace of chosen steps by torch's profiler, to be looked at in a browser (Perfetto, chrome://tracing)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from d2ft_hpc.launch.control import print_line


class StepTrace:
    """Writes what this rank does in some steps to a file once they are over. If the file cannot be written, a message
    says so, and the run goes on.

    steps: counted from 1, as the progress line counts them; None: no trace.
    """

    def __init__(self, steps: range | None, path: Path) -> None:
        self._steps, self._path = steps or range(0), path
        self._profile: Any = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step."""
        if number in self._steps and self._profile is None:
            self._profile = torch.profiler.profile()  # of the CPU, and of the GPU if there is one
            self._profile.start()
        yield
        if number + 1 not in self._steps:
            self.close()

    def close(self) -> None:
        """Ends the trace that is under way, if one is."""
        profile, self._profile = self._profile, None
        if profile is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what was launched belongs to it
        profile.stop()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:
            print_line(f"d2ft-hpc: warning: {self._path}: the trace cannot be written: {error}")
