"""`d2ft-hpc score`: measures scores without training, for `d2ft-hpc plan` on another machine."""

from __future__ import annotations

from pathlib import Path

import h5py
import torch

from d2ft_hpc.config import RunConfig
from d2ft_hpc.errors import ConfigError, ResultsError
from d2ft_hpc.launch import Control, agreed
from d2ft_hpc.launch.watch import Watch
from d2ft_hpc.paths import why_not_writable
from d2ft_hpc.recording.entries import record_scores
from d2ft_hpc.recording.provenance import describe_environment
from d2ft_hpc.results import ResultsWriter
from d2ft_hpc.training.job import set_up
from d2ft_hpc.training.measurements import measure_job
from d2ft_hpc.training.probe_scores import measure_scores
from d2ft_hpc.training.run_log import record_job


def _check_output(output: Path) -> None:
    """Raises ResultsError if another file than one of scores would be replaced, or if none can be written."""
    if why := why_not_writable(output.parent):
        raise ResultsError(f"{output}: cannot be written ({why}); choose another file")
    if output.exists() and not (output.is_file() and h5py.is_hdf5(output)):
        raise ResultsError(
            f"{output}: exists and is no file of scores; choose another name, such as scores.h5"
        )


def score(
    output: Path, config: RunConfig, control: Control, device: torch.device, launcher: str, watch: Watch
) -> None:
    """Writes a results file with the model's costs and scores as a run of this configuration would measure them.

    An older file of scores is replaced. Raises ConfigError if the planner reads no scores.
    """
    with agreed(control, "set-up"):
        _check_output(output)
        job = set_up(config, control, device)
    measured = measure_job(job)
    scores = measure_scores(job, job.model, job.loss, watch)
    if scores is None:
        raise ConfigError(
            f"plan.planner={config.plan.planner}: reads no scores; choose another, such as joint"
        )
    with agreed(control, "writing the scores"):
        if control.rank == 0:
            output.unlink(missing_ok=True)
            with ResultsWriter(output) as writer:
                record_job(job, writer, describe_environment(control, job.layout, launcher, device), measured)
                record_scores(writer, scores, 0)
