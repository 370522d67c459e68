"""What happens between two steps: saves that are due, and the end of the run when a signal asks for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NoReturn

from d2ft_hpc.config import TrainConfig
from d2ft_hpc.engines.engine import Engine
from d2ft_hpc.errors import DivergedError
from d2ft_hpc.launch.agree import AgreedError
from d2ft_hpc.recording.step_recorder import StepRecorder
from d2ft_hpc.training.checkpoint import Position
from d2ft_hpc.training.job import Job
from d2ft_hpc.training.run_log import RunLog
from d2ft_hpc.training.saver import CheckpointSaver


class BetweenSteps:
    """All ranks act at the same boundaries, though none waits for another unless something is due."""

    def __init__(
        self,
        job: Job,
        engine: Engine,
        saver: CheckpointSaver,
        recorder: StepRecorder,
        log: RunLog,
        settle: Callable[[Position], Position],
    ) -> None:
        """settle: completes what is still under way and belongs into a checkpoint."""
        self._job, self._engine, self._saver = job, engine, saver
        self._recorder, self._log, self._watch = recorder, log, log.watch
        self._settle = settle
        self._saved_at = time.monotonic()
        self._gives_up = False

    def cross(self, position: Position) -> tuple[Position, bool]:
        """Called before a step, with the position. False: everything is saved and no step may follow.

        Raises DivergedError on all ranks soon after a step whose loss was not finite on one of them.
        """
        self._ask_when_due_by_the_clock()
        self._ask_when_diverged()
        action = self._watch.at_step_boundary(position.steps_done)
        if action == "give up":
            self._diverged(position, self._watch.reasons[action])
        if action is not None or _is_due(position, self._job.config.train):
            position = self._save(position)
        if action != "stop":
            return position, True
        self._saver.finish()
        text = f"stopped after {position.steps_done} steps by {self._watch.reasons['stop']}"
        self._log.say(f"{text}; saved: start it again with train.resume=auto to go on")
        self._log.note(position.steps_done, "stop", text)
        return position, False

    def end(self, position: Position) -> None:
        """After the last step. Raises DivergedError as `cross`."""
        self._watch.enter("saving a checkpoint")
        self._require_finite_losses(position)
        if _is_due(position, self._job.config.train):
            self._save(position)
        self._saver.finish()

    def _ask_when_due_by_the_clock(self) -> None:
        interval = self._job.config.train.checkpoint_interval
        if interval is None or interval.unit != "minute":
            return
        if time.monotonic() - self._saved_at > 60 * interval.number:
            self._saved_at = time.monotonic()
            if self._job.control.rank == 0:
                self._watch.request("save")

    def _ask_when_diverged(self) -> None:
        control = self._job.control
        if self._recorder.fault and not self._gives_up:
            self._gives_up = True
            where = "" if control.world_size == 1 else f" on rank {control.rank}"
            self._watch.request("give up", f"{self._recorder.fault}{where}")

    def _require_finite_losses(self, position: Position) -> None:
        """Reads all losses up to here; all ranks call it together."""
        self._recorder.finish()
        faults = [part.decode() for part in self._job.control.all_gather(self._recorder.fault.encode())]
        if any(faults):
            self._diverged(position, next(filter(None, faults)))

    def _diverged(self, position: Position, why: str) -> NoReturn:
        """why: as `StepRecorder.fault`."""
        steps_done, text = why.split(" ", 1)
        self._log.note(position.steps_done, "diverged", text)
        raise DivergedError(text, int(steps_done)) from AgreedError()

    def _save(self, position: Position) -> Position:
        if self._saver.newest_step == position.steps_done:
            return position  # nothing was computed since the start or the last save
        start = time.perf_counter()
        self._watch.enter("saving a checkpoint")
        self._require_finite_losses(position)
        position = self._settle(position)
        plan = self._engine.executor.plan
        assert plan is not None
        saved = self._saver.save(self._engine, plan, position, self._recorder.flush)
        seconds = time.perf_counter() - start
        self._saved_at = time.monotonic()
        self._log.note(position.steps_done, "checkpoint", saved.name, seconds)
        logging.getLogger(__name__).info("%s: training waited %.3f s", saved.name, seconds)
        return position


def _is_due(position: Position, config: TrainConfig) -> bool:
    """Whether a save is due by the count of steps or epochs."""
    interval = config.checkpoint_interval
    if interval is None or interval.unit == "minute" or position.steps_done == 0:
        return False
    if interval.unit == "step":
        return position.steps_done % interval.number == 0
    return position.batches_done == 0 and position.epochs_done % interval.number == 0
