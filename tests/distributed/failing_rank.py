"""The command line with a bug in it: on rank 1 the third step raises."""

from __future__ import annotations

import sys
from typing import Any

from d2ft_hpc.cli import main
from d2ft_hpc.launch import detect
from d2ft_hpc.recording.step_recorder import StepRecord
from d2ft_hpc.training.step_runner import StepRunner

run = StepRunner.run


def failing_run(self: StepRunner, *arguments: Any, step: int, **options: Any) -> StepRecord:
    if step == 2 and detect().rank == 1:
        raise KeyError("a bug")
    return run(self, *arguments, step=step, **options)


if __name__ == "__main__":
    StepRunner.run = failing_run  # type: ignore[method-assign]
    sys.exit(main())
