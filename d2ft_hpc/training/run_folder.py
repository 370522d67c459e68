"""A run's folder is a contract: what is in it, and under which name.

config.yaml           the effective configuration, every default filled in
launches.jsonl        one line for each start of the run: when, where, which code, versions and settings
results.h5            everything measured (`results.schema`)
model.safetensors     the trained weights in timm's names, once the run is finished
adapter/              of a run with model.lora: the trained factors, as peft reads them
checkpoints/step-N/   see `checkpoint`
logs/rank-R.log       what each rank had to say, over all starts
errors/rank-R.txt     where each rank was when a start of the run last failed
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import logging
import os
import platform
import re
import socket
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import d2ft_hpc
from d2ft_hpc.config import RunConfig
from d2ft_hpc.config_file import read_values
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.files import atomic
from d2ft_hpc.launch import Control

CONFIG = "config.yaml"
LAUNCHES = "launches.jsonl"
RESULTS = "results.h5"
MODEL = "model.safetensors"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"

_RECORDED = re.compile(
    r"(SLURM|OMP|MKL|NCCL|GLOO|UCX|FI|MPICH|I_MPI|OMPI_MCA|PMI|TORCH|PYTORCH|CUDA|HDF5|HF_HUB)_\w+|MASTER_\w+|PATH"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|JWT|CREDENTIAL|AUTH", re.IGNORECASE)


def record_launch(config: RunConfig, control: Control, environment: Mapping[str, Any], start: str) -> None:
    """Writes the configuration and a line on this start; on rank 0. `start` says from where the run goes on."""
    folder = config.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write(folder / CONFIG, config.to_yaml())
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "start": start,
        "hosts": control.hosts,
        "code": describe_code(),
        "environment": dict(environment),
        "variables": recorded_variables(os.environ),
    }
    atomic.append_line(folder / LAUNCHES, json.dumps(line))


def read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration that the run in this folder had, None if there is none. Raises ConfigError."""
    try:
        return read_values(folder / CONFIG)
    except FileNotFoundError:
        return None
    except ConfigError as error:
        raise ConfigError(f"{error}; if the run in its folder is yours, remove this file") from None


def describe_code() -> dict[str, str]:
    """The package's version, the SHA-256 of its sources and, in a git checkout, the commit."""
    package = Path(d2ft_hpc.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    described = {"version": d2ft_hpc.__version__, "sources_sha256": digest.hexdigest()}
    if (package.parent / ".git").exists():
        described["commit"] = _commit(package.parent / ".git")
    return described


def recorded_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that steer launchers and libraries, without anything that may be a secret."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if _RECORDED.fullmatch(name) and not _SECRET.search(name)
    }


def _commit(git: Path) -> str:
    """What HEAD is, read from git's files: no process may be forked once MPI runs."""
    try:
        if git.is_file():  # a worktree
            git = Path(git.read_text().removeprefix("gitdir: ").strip())
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        reference = head.removeprefix("ref: ")
        shared = git / "commondir"
        common = git / shared.read_text().strip() if shared.exists() else git
        if (common / reference).exists():
            return (common / reference).read_text().strip()
        packed = (line.split() for line in (common / "packed-refs").read_text().splitlines())
        return next((words[0] for words in packed if words[1:] == [reference]), "unknown")
    except OSError:
        return "unknown"


def open_log(folder: Path, rank: int) -> None:
    """Sends this rank's log records, warnings and fatal signals' tracebacks to logs/rank-R.log as well."""
    path = folder / "logs" / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("d2ft_hpc").setLevel(logging.INFO)
    logging.captureWarnings(True)
    faulthandler.enable(file)
    logging.getLogger("d2ft_hpc").info(
        "rank %d is process %d on %s, python %s",
        rank,
        os.getpid(),
        socket.gethostname(),
        platform.python_version(),
    )
