"""Checks of the file system that the run writes to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import h5py

from d2ft_hpc.config import RunConfig
from d2ft_hpc.doctor.finding import Finding
from d2ft_hpc.errors import D2ftError
from d2ft_hpc.files.hdf5 import reason
from d2ft_hpc.launch import Control
from d2ft_hpc.launch.control import describe_ranks
from d2ft_hpc.training.resume import choose_start
from d2ft_hpc.training.run_folder import KEPT_CHECKPOINTS

_CHOOSE = "choose a folder on the shared file system (scratch, work) with run.folder=..."


def check_output(config: RunConfig, control: Control) -> list[Finding]:
    """Whether every rank can write, all see the same folder, and HDF5 can lock files; all ranks call it together."""
    folder = Path(config.run.folder)
    own = folder / f".doctor-{control.rank}"
    fault = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with own.open("w") as file:
            file.write(control.host)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        fault = error.strerror or str(error)
    written = [part == b"" for part in control.all_gather(fault.encode())]
    faults = [f"cannot write to {folder.absolute()}: {fault}"] if fault else []
    absent = [rank for rank, done in enumerate(written) if done and not (folder / f".doctor-{rank}").exists()]
    if absent:
        ranks = describe_ranks(absent, control.hosts)
        faults.append(f"{folder.absolute()} is not shared: no file here of {ranks}")
    findings = [Finding("output", "failed", text, _CHOOSE) for text in faults]
    if not fault:
        findings.append(_check_locks(folder, own.with_suffix(".h5")))
    control.all_gather(b"")  # everybody has looked
    if not fault:
        own.unlink(missing_ok=True)
    return findings


def check_start(config: RunConfig, control: Control) -> Finding:
    """Whether `train` would begin, or go on, in the run's folder; all ranks call it together."""
    try:
        start = choose_start(config, control)
    except D2ftError as error:
        return Finding("run", "failed", str(error))
    if start.finished:
        return Finding(
            "run",
            "warning",
            f"{config.run_folder} is finished: train would do nothing",
            "choose another run.name",
        )
    begins = "begins in" if start.checkpoint is None else f"goes on from {start.checkpoint.name} of"
    return Finding("run", "ok", f"{begins} {config.run_folder}")


def check_space(config: RunConfig, parameters: int) -> list[Finding]:
    """parameters: of the model."""
    folder = Path(config.run.folder)
    moments = 2 if config.optimizer.name == "adamw" else 1
    needed = 4 * parameters * ((1 + moments) * (KEPT_CHECKPOINTS + 1) + 1)
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return []  # `check_output` has said why
    text = f"{_gigabytes(free)} free at {folder.absolute()}, about {_gigabytes(needed)} needed"
    if free < needed:
        return [Finding("space", "failed", text, f"free space, or {_CHOOSE}")]
    return [Finding("space", "ok", text)]


def _check_locks(folder: Path, path: Path) -> Finding:
    """path: a file in `folder` to try it with."""
    try:
        with h5py.File(path, "w", locking=True) as file:
            file["locked"] = 1
    except OSError as error:
        return Finding(
            "locks",
            "warning",
            f"the file system of {folder.absolute()} refuses HDF5's locks ({reason(error)}); the run takes none",
            "export HDF5_USE_FILE_LOCKING=FALSE for programs that open its results with locks",
        )
    finally:
        path.unlink(missing_ok=True)
    return Finding("output", "ok", f"{folder.absolute()} can be written and locked")


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
