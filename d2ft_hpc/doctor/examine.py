"""Runs all checks in order and prints what they found."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from d2ft_hpc.config import RunConfig, read_config
from d2ft_hpc.doctor.finding import Finding, as_json, as_text, of_all_ranks, of_error
from d2ft_hpc.errors import ConfigError, LaunchError
from d2ft_hpc.launch import Control, LaunchEnvironment, connect, detect, device_type_of
from d2ft_hpc.launch.control import SoloControl
from d2ft_hpc.launch.environment import likely_rank
from d2ft_hpc.launch.mpi_control import FRAGILE_START, MpiControl
from d2ft_hpc.safe_text import say


def examine(path: Path, overrides: Sequence[str], *, json: bool) -> int:
    """Checks everything that a run of this configuration needs, on all ranks that a launcher started.

    Rank 0 prints. Returns 0, or 1 if the run would fail. Where the ranks do not meet, rank 0 goes on alone.
    """
    findings: list[Finding] = []
    rank = likely_rank()
    control: Control | None = None
    try:
        config = read_config(path, overrides)
        environment = detect()
        rank = environment.rank
        left = seconds_left() if rank == 0 else None
        control, found = _meet(config, environment)
        findings.append(found)
        if control is not None:
            findings += _checks(config, control, left)
    except ConfigError as error:
        findings.append(of_error("config", error, "correct the key"))
    except LaunchError as error:
        findings.append(of_error("ranks", error, "start with mpirun, srun, torchrun or deepspeed"))
    if rank == 0:
        say(as_json(findings) if json else as_text(findings))
    if control is not None:
        control.close()
    return int(any(finding.status == "failed" for finding in findings))


def seconds_left() -> float | None:
    """Until Slurm's time limit; None without one."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) - time.time() if re.fullmatch("[0-9]{1,12}", end) else None


def _device_of(config: RunConfig) -> Literal["auto", "cpu"]:
    """Where a GPU that the run asks for is absent, the other checks take the CPU."""
    return "cpu" if config.engine.device == "cpu" else "auto"


def _meet(config: RunConfig, environment: LaunchEnvironment) -> tuple[Control | None, Finding]:
    """None on a rank other than 0 that stayed alone."""
    try:
        control = connect(
            environment,
            device_type=_device_of(config),
            timeout_seconds=config.launch.timeout_seconds,
        )
    except LaunchError as error:
        return SoloControl() if environment.rank == 0 else None, of_error(
            "ranks", error, "see `srun --mpi=list` and the mpirun of the MPI that mpi4py loads"
        )
    ranks, hosts = control.world_size, len(set(control.hosts))
    fragile = isinstance(control, MpiControl) and control.start_is_fragile
    text, fix = FRAGILE_START if fragile else ("", "")
    library = f" over {control.library}" if hasattr(control, "library") else ""
    return control, Finding(
        "ranks",
        "warning" if fragile else "ok",
        f"{ranks} rank{'s' * (ranks > 1)} on {hosts} host{'s' * (hosts > 1)} by {environment.launcher}{library}"
        f"{'. ' * fragile}{text}",
        fix,
    )


def _checks(config: RunConfig, control: Control, left: float | None) -> list[Finding]:
    """Every check, on all ranks together."""
    import torch
    from torch import distributed

    from d2ft_hpc.doctor import machine, storage, work

    device = torch.device(device_type_of(_device_of(config)))
    findings = of_all_ranks(control, machine.check_versions(control))
    findings += of_all_ranks(control, [machine.check_gpus(control, device, config.engine.device)])
    if distributed.is_initialized():
        findings += of_all_ranks(control, machine.check_all_reduce(control, device))
    of_output = of_all_ranks(control, storage.check_output(config, control))
    findings += of_output
    if all(finding.status != "failed" for finding in of_output):
        findings += of_all_ranks(control, [storage.check_start(config, control)])
    job, model, found = work.check_parts(config, control, device)
    findings += of_all_ranks(control, found)
    if model is not None:
        findings += storage.check_space(config, sum(parameter.numel() for parameter in model.parameters()))
    if all(part == b"1" for part in control.all_gather(b"1" if job else b"0")) and job is not None:
        findings += work.check_plans(job)  # by rank 0, which prints
        findings += of_all_ranks(control, [work.check_time(job, left)])[:1]
    return findings
