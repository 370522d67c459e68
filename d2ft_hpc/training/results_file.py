"""The results file of a run that begins or goes on, whatever there is of an older one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2ft_hpc.errors import LostResultsError
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.launch.control import print_line
from d2ft_hpc.recording.entries import note, record_plan
from d2ft_hpc.results import ResultsWriter, open_run
from d2ft_hpc.results.hdf5_layout import rank_file
from d2ft_hpc.results.superseded import discard, has_record, is_unbegun, set_aside
from d2ft_hpc.training import run_folder
from d2ft_hpc.training.job import Job
from d2ft_hpc.training.measurements import Measurements
from d2ft_hpc.training.resume import Start
from d2ft_hpc.training.run_log import record_job

BEFORE_ALL = -2
"""As the last step that is kept: nothing is, not even the evaluation before the first step."""


def open_results(
    job: Job, environment: Mapping[str, str | int], measured: Measurements, start: Start
) -> ResultsWriter:
    """Rank 0's writer. A resumed run goes on with the record that it had, or with a new one where that is lost; one
    that begins takes the place of a run that never began a step. Raises ResultsError."""
    path, settings = job.config.run_folder / run_folder.RESULTS, job.config.results
    options: dict[str, Any] = {
        "locking": settings.locking,
        "rank_files": job.control.world_size if settings.file_per_rank else 0,
    }
    steps_done = start.position.steps_done
    if is_unbegun(path) and start.checkpoint is None:
        discard(path, settings.locking)
    lost = ""
    try:
        if start.checkpoint is not None:
            writer = ResultsWriter.resume(path, last_step=steps_done - 1, **options)
        elif job.config.train.resume == "auto" and has_record(path):  # ended before its first checkpoint
            writer = ResultsWriter.resume(path, last_step=BEFORE_ALL, **options)
        else:
            writer = ResultsWriter(path, **options)
    except LostResultsError as error:
        left = set_aside(path, settings.locking)
        writer = ResultsWriter(path, **options)
        lost = f"the record of the first {steps_done} steps is gone ({error})"
        lost += "" if left is None else f"; what is left of it is in {left}"
    if start.checkpoint is None or lost:
        record_job(job, writer, environment, measured)
    if start.checkpoint is not None:
        ranks = job.control.world_size
        note(writer, steps_done, "resume", f"from {start.checkpoint.name} on {ranks} ranks")
        if lost:
            print_line(f"d2ft-hpc: warning: {lost}")
            note(writer, steps_done, "record", lost)
    return writer


def first_plan_of(writer: ResultsWriter, job: Job, executor: PlanExecutor, start: Start) -> int:
    """How many plans of a resumed run its record does not have; it gets the one in force, if that is missing."""
    writer.flush()
    with open_run(writer.path) as run:
        missing = start.position.plans_made - len(run.table("plans", ["step"])["step"])
    if missing > 0:
        assert executor.plan is not None
        record_plan(job.costs, executor, writer, executor.plan, start.position.steps_done, 0.0)
    return max(missing - 1, 0)


def open_own_results(job: Job, start: Start) -> ResultsWriter:
    """This rank's own file, in runs with a file for each rank."""
    settings = job.config.results
    path = rank_file(job.config.run_folder / run_folder.RESULTS, job.control.rank)
    if start.checkpoint is None and is_unbegun(path):
        discard(path, settings.locking)
    if job.config.train.resume and has_record(path):
        last_step = BEFORE_ALL if start.checkpoint is None else start.position.steps_done - 1
        try:
            return ResultsWriter.resume(path, last_step=last_step, locking=settings.locking)
        except LostResultsError:  # rank 0 has told of the whole record, or the run still has the rest of it
            set_aside(path, settings.locking)
    return ResultsWriter(path, locking=settings.locking)
