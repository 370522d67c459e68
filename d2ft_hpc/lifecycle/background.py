"""The next plan is solved while training goes on, and comes into force on all ranks at one batch boundary."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from d2ft_hpc.errors import PlanError
from d2ft_hpc.launch import Control
from d2ft_hpc.planning import SkipPlan

_PLAN, _FAULT = b"+", b"-"


@dataclass(frozen=True)
class SolvedMeanwhile:
    """What became of a plan that was solved in the background; the same on every rank.

    plan: None if there is none, for the `fault` that it tells. seconds: from the order to the boundary.
    """

    plan: SkipPlan | None
    fault: str
    seconds: float


class BackgroundSolver:
    """Rank 0 solves in a thread (HiGHS and NumPy release Python's lock); all ranks call every method together. While
    a plan is being solved, each boundary costs one broadcast of a few bytes; no step ever waits for the solver. A
    plan that takes longer than the steps until the next one is due comes into force later, and none is begun
    meanwhile.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._thread: ThreadPoolExecutor | None = None
        self._solving: Future[bytes] | None = None
        self._started: float | None = None

    @property
    def is_under_way(self) -> bool:
        return self._started is not None

    def start(self, solve: Callable[[], SkipPlan]) -> bool:
        """Begin to solve the next plan; False if one is still being solved. `solve` runs on rank 0 and must not use
        MPI."""
        if self.is_under_way:
            return False
        self._started = time.perf_counter()
        if self._control.rank == 0:
            self._thread = self._thread or ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner")
            self._solving = self._thread.submit(lambda: solve().to_message())
        return True

    def at_boundary(self, *, wait: bool = False) -> SolvedMeanwhile | None:
        """The plan that comes into force now, if it is ready. wait: block until it is, as when a run must know its
        plan for a checkpoint. A budget that no plan keeps is told as a fault; any other error of the solver is raised
        on rank 0.
        """
        if self._started is None:
            return None
        message = self._control.broadcast(self._result(wait) if self._control.rank == 0 else None)
        if not message:
            return None
        seconds = time.perf_counter() - self._started
        self._started = self._solving = None
        if message.startswith(_FAULT):
            return SolvedMeanwhile(None, message[1:].decode(), seconds)
        return SolvedMeanwhile(SkipPlan.from_message(message[1:]), "", seconds)

    def _result(self, wait: bool) -> bytes:
        """Empty while the solver is at work."""
        assert self._solving is not None
        if not wait and not self._solving.done():
            return b""
        try:
            return _PLAN + self._solving.result()
        except PlanError as error:
            return _FAULT + str(error).encode()
