"""The results file of a run that begins or goes on, whatever an older run has left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.launch.control import print_line
from d2ft_hpc.recording.entries import note, record_plan
from d2ft_hpc.results import ResultsWriter, open_run
from d2ft_hpc.results.hdf5_layout import rank_file
from d2ft_hpc.results.superseded import BEFORE_ALL, has_record, open_record
from d2ft_hpc.training import run_folder
from d2ft_hpc.training.job import Job
from d2ft_hpc.training.measurements import Measurements
from d2ft_hpc.training.resume import Start
from d2ft_hpc.training.run_log import record_job


def open_results(
    job: Job, environment: Mapping[str, str | int], measured: Measurements, start: Start
) -> ResultsWriter:
    """Rank 0's writer. A resumed run goes on with its record, or with a new one if that is lost. A new run replaces
    one that never began a step. Raises ResultsError."""
    path = job.config.run_folder / run_folder.RESULTS
    rank_files = job.control.world_size if job.config.results.file_per_rank else 0
    steps_done = start.position.steps_done
    writer, lost = open_record(path, _last_step(path, job, start), rank_files=rank_files)
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
    """How many plans of a resumed run are missing in its record. If the plan in force is missing, it is added."""
    writer.flush()
    with open_run(writer.path) as run:
        missing = start.position.plans_made - len(run.table("plans", ["step"])["step"])
    if missing > 0:
        assert executor.plan is not None
        record_plan(job.costs, executor, writer, executor.plan, start.position.steps_done, 0.0)
    return max(missing - 1, 0)


def open_own_results(job: Job, start: Start) -> ResultsWriter:
    """This rank's own file, in runs with a file for each rank."""
    path = rank_file(job.config.run_folder / run_folder.RESULTS, job.control.rank)
    last_step = _last_step(path, job, start) if has_record(path) else None
    # Where it is lost, rank 0 has told of the whole record, or the run still has the rest of it.
    return open_record(path, last_step)[0]


def _last_step(path: Path, job: Job, start: Start) -> int | None:
    """Of the record at the path that the run goes on with."""
    if start.checkpoint is not None:
        return start.position.steps_done - 1
    ended_early = job.config.train.resume == "auto" and has_record(path)  # before its first checkpoint
    return BEFORE_ALL if ended_early else None
