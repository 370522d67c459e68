"""How fast every rank computed under the plan in force, for the next one: a slowed rank gets less, a freed one more."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from d2ft_hpc.launch import Control, gathered
from d2ft_hpc.lifecycle.costs import relative_speeds
from d2ft_hpc.metering.phases import StepTimes

_STEPS = 50
"""So many newest steps count."""
_COMPUTING = ("forward", "backward")


class SpeedWatch:
    """Takes this rank's steps; waiting for others and for data does not count as computing."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._steps: deque[tuple[float, StepTimes]] = deque(maxlen=_STEPS)
        self._skips_next = True

    def begin_plan(self) -> None:
        """A new plan is in force: older steps no longer count, and neither does the next one, which is metered."""
        self._steps.clear()
        self._skips_next = True

    def add(self, flops: float, times: StepTimes) -> None:
        """A step that computed `flops` on this rank."""
        if not self._skips_next:
            self._steps.append((flops, times))
        self._skips_next = False

    def speeds(self, before: Sequence[float]) -> list[float]:
        """Relative speed of each rank, mean 1. All ranks call it together and return the same. before: speeds that
        ranks keep if they computed nothing, and that all ranks keep if some rank has no step to measure.
        """
        own = [flops / seconds for flops, times in self._steps if (seconds := _computing(times)) > 0]
        rate = float(np.median(own)) if own else float("nan")
        of_ranks = np.array(gathered(self._control, rate))
        if np.isnan(of_ranks).any():
            return list(before)
        idle = of_ranks == 0
        old = np.asarray(before, dtype=np.float64)
        if idle.any():
            busy_scale = of_ranks[~idle].mean() / old[~idle].mean() if (~idle).any() else 1.0
            of_ranks = np.where(idle, old * busy_scale, of_ranks)
        return relative_speeds([float(1 / rate) for rate in of_ranks])


def _computing(times: StepTimes) -> float:
    seconds = times.seconds()
    return sum(seconds.get(phase, 0.0) for phase in _COMPUTING)
