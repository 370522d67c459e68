"""`results.h5` of a loop of the user's own."""

from __future__ import annotations

import atexit
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
import yaml
from torch import Tensor, nn

from d2ft_hpc.engines.planned_bytes import PlannedBytes
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.launch import agreed
from d2ft_hpc.lifecycle import PlanController
from d2ft_hpc.metering import StepCosts
from d2ft_hpc.metering.memory import reset_peak, used_bytes
from d2ft_hpc.metering.phases import StepTimes
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.paths import why_not_writable
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.recording.entries import note, record_plan, record_scores
from d2ft_hpc.recording.provenance import describe_environment, describe_model
from d2ft_hpc.recording.step_recorder import StepRecord, StepRecorder, on_host
from d2ft_hpc.results import ResultsWriter, open_run
from d2ft_hpc.results.hdf5_layout import rank_file
from d2ft_hpc.results.run_lock import check_unlocked
from d2ft_hpc.results.superseded import has_record, open_record
from d2ft_hpc.settings import of_percent
from d2ft_hpc.user_loop.batch_counter import BatchWork

FILE = "results.h5"

_OPEN: WeakValueDictionary[Path, LoopRecord] = WeakValueDictionary()
"""The records that are open in this process, by their files."""


class LoopRecord:
    """Writes what `d2ft-hpc train` writes of a run, as far as the loop can be watched; nothing without a folder.

    A step's seconds go from the optimiser's step before to its own, without an evaluation in between. Data: until the
    batch's first forward; backward: all between a forward and the optimiser's step that is not another forward. A
    step's memory is counted from its beginning, for which torch's peak of a GPU's is reset there. The gradient's norm
    is that of what the optimizer gets, after any clipping; DeepSpeed's before it. Ranks send each other nothing but
    parts of such norms, where gradients are spread over them: of several, each has a file of its own
    (`results.ranks/`), which `results.h5` joins. A kill loses the last five seconds.
    """

    def __init__(
        self,
        folder: str | None,
        settings: Mapping[str, Any],
        model: nn.Module,
        subnets: SubnetMap,
        costs: StepCosts,
    ) -> None:
        """settings: of plans, for the record. model: before anything spreads its weights. costs: of the whole model.

        All ranks together. Raises ConfigError where nothing can be written into the folder, ResultsError where another
        process writes a record there.
        """
        self._path = None if folder is None else Path(folder) / FILE
        if folder is not None and (why := why_not_writable(Path(folder))):
            raise ConfigError(
                f"results={folder!r}: nothing can be written there ({why}); choose another folder"
            )
        if self._path is not None:
            self._take_over(self._path)
        self._settings, self._costs = settings, costs
        self._model = describe_model(model, subnets, costs)
        self._name = type(model).__name__
        self._writers: list[ResultsWriter] = []
        self._writer: ResultsWriter | None = None  # of rank 0
        self._recorder: StepRecorder | None = None
        self._plan: SkipPlan | None = None  # the newest one in the record
        self._plans, self._last_hash = 0, ""  # of the record
        self._planning_seconds = 0.0
        self._steps = 0
        self._times: StepTimes | None = None
        self._device = torch.device("cpu")
        self._norm: Tensor | float = math.nan
        self._losses: list[Tensor] = []
        self._has_told_of_recomputing = False

    @staticmethod
    def _take_over(path: Path) -> None:
        """Closes the record that an earlier loop of this process has there, as of a notebook's cell that runs again.
        Raises ResultsError where another process writes one."""
        before = _OPEN.pop(path.resolve(), None)
        if before is not None:
            before.close()
        check_unlocked(path)

    @property
    def is_on(self) -> bool:
        """There is a folder, and the record goes on."""
        return self._path is not None

    def loss(self, loss: Tensor | float) -> None:
        """The mean loss of a micro-batch of this rank, as it is before any division by their number. Call it before the
        optimizer's step, after which it would be the next step's."""
        if self.is_on:
            # A copy, since loops divide the loss in its place, by the number of micro-batches.
            self._losses.append(torch.as_tensor(loss).detach().to(torch.float32, copy=True))

    def evaluation(self, accuracy: float, loss: float = math.nan, samples: int = -1) -> None:
        """Records an evaluation of the present model. accuracy: top-1, 0 to 1, over all ranks; rank 0's value counts.
        Raises ConfigError where the accuracy is no share."""
        if not 0 <= accuracy <= 1:
            raise ConfigError(f"accuracy={accuracy:g} is not between 0 and 1{of_percent(accuracy)}")
        if self._writer is not None:
            row = {"step": self._steps, "accuracy": accuracy, "loss": loss, "samples": samples}
            self._writer.append("evaluations", row)

    def close(self) -> None:
        """Ends the record: `results.h5` becomes one file. Called at the script's end, too."""
        if self._recorder is not None:
            self._recorder.finish()
            for writer in self._writers:
                writer.close(complete=not hasattr(sys, "last_value"))
            self._recorder, self._writer, self._writers = None, None, []
            atexit.unregister(self.close)

    def turn_to(self, phase: str, plans: PlanController, device: torch.device, steps_done: int) -> None:
        """What the loop does from here on, if `is_on`. At the first call the files are opened, on all ranks together:
        those of a loop that goes on after `steps_done` steps go on.

        Raises ResultsError where the folder holds another run.
        """
        if self._recorder is None:
            self._open(plans, device, steps_done)
        if self._times is None:
            self._times, self._device = StepTimes(device), device
            reset_peak(device)
        self._times.turn_to(phase)

    def drop_batch(self) -> None:
        """The batch broke off and begins anew; its time belongs to the step that comes of it."""
        self._losses = []

    def pause(self) -> None:
        """What the loop did since the last step, and does until the next one begins, belongs to no step."""
        self._times = None

    def gradient_norm(self, norm: Tensor | float | None) -> None:
        """Of the step that is made now; None where nobody knows."""
        self._norm = math.nan if norm is None else norm

    def end_batch(
        self,
        step: int,
        work: BatchWork,
        plans: PlanController,
        learning_rate: float,
        planned_bytes: PlannedBytes | None,
        *,
        recomputes: bool,
    ) -> None:
        """A batch is done, under the plan that is still in force. learning_rate: NaN: the optimiser made no step.
        planned_bytes: of this rank; None where the engine is none of ours to foresee. recomputes: measured compute has
        activations that were computed once more."""
        if self._recorder is None or self._times is None:
            return
        self._steps = step + 1
        self._record_plan(step, plans)
        if recomputes and self._writer is not None and not self._has_told_of_recomputing:
            note(self._writer, step, "recompute", "blocks are computed once more in the backward")
            self._has_told_of_recomputing = True
        times = self._times
        loss = on_host(torch.stack(self._losses).mean() if self._losses else math.nan)
        norm = on_host(self._norm)
        times.end()  # after which they are on the host, too
        self._recorder.add(
            StepRecord(
                step=step,
                epoch=-1,
                plan=-1 if plans.plan is None else self._plans - 1,
                learning_rate=learning_rate,
                gradient_norm=norm,
                loss=loss,
                times=times,
                of_rank={
                    **asdict(work),
                    **({} if planned_bytes is None else planned_bytes.columns()),
                    "memory_bytes": used_bytes(self._device),
                },
                skipped=math.isnan(learning_rate),
            )
        )
        self._times, self._losses, self._norm = None, [], math.nan

    def _record_plan(self, step: int, plans: PlanController) -> None:
        plan, before = plans.plan, self._plan
        if plan is None or plan is before:
            return
        self._plan = plan
        seconds = plans.planning_seconds - self._planning_seconds
        self._planning_seconds = plans.planning_seconds
        if before is None and self._plans and plan.hash == self._last_hash:  # a loop that goes on
            return
        self._plans += 1
        if self._writer is not None:
            if plans.scores is not None:
                record_scores(self._writer, plans.scores, step)
            record_plan(self._costs, plans.engine.executor, self._writer, plan, step, seconds)

    def _open(self, plans: PlanController, device: torch.device, steps_done: int) -> None:
        assert self._path is not None
        control, layout = plans.control, plans.context.placement.layout
        ranks = control.world_size
        with agreed(control, "opening the results"):
            own = None
            if control.rank == 0:
                self._writer = self._opened(self._path, steps_done, ranks if ranks > 1 else 0)
                self._count_plans(self._writer)
                self._writer.put("config", {"yaml": yaml.safe_dump(dict(self._settings))})
                self._writer.put(
                    "environment", {}, describe_environment(control, layout, "a loop of its own", device)
                )
                parameters, attributes = self._model
                self._writer.put("model", parameters, {"name": self._name, **attributes})
                if steps_done:
                    note(self._writer, steps_done, "resume", f"after {steps_done} steps on {ranks} ranks")
            if ranks > 1:
                own = self._opened(rank_file(self._path, control.rank), steps_done, 0)
        self._recorder = StepRecorder(control, self._writer, own)
        _OPEN[self._path.resolve()] = self
        self._steps = steps_done
        atexit.register(self.close)

    def _count_plans(self, writer: ResultsWriter) -> None:
        writer.flush()
        with open_run(writer.path) as run:
            hashes = run.table("plans", ["hash"])["hash"]
        self._plans, self._last_hash = len(hashes), "".join(hashes[-1:])

    def _opened(self, path: Path, steps_done: int, rank_files: int) -> ResultsWriter:
        last_step = steps_done - 1 if steps_done and has_record(path) else None
        writer, _ = open_record(path, last_step, rank_files=rank_files)
        self._writers.append(writer)
        return writer
