"""A run's folder is a contract: what is in it, and under which name.

config.yaml           the effective configuration, every default filled in
launches.jsonl        one line for each start of the run: when, where, which code, versions and settings; by it a
                      folder is known as a run's
results.h5            everything measured (`results.schema`)
model.safetensors     the trained weights in timm's names, once the run is finished
adapter/              of a run with model.lora: the trained factors, as peft reads them
checkpoints/step-N/   see `checkpoint`
logs/rank-R.log       what each rank had to say, over all starts
traces/rank-R.json    what each rank did in train.trace_steps
errors/rank-R.txt     where each rank was when a start of the run last failed
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import logging
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import d2ft_hpc
from d2ft_hpc.config import RunConfig
from d2ft_hpc.config_file import read_values
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.files import atomic
from d2ft_hpc.launch import Control
from d2ft_hpc.paths import why_not_writable
from d2ft_hpc.results.hdf5_layout import rank_file, segments_folder
from d2ft_hpc.safe_text import printable, scrubbed, shown

CONFIG = "config.yaml"
LAUNCHES = "launches.jsonl"
RESULTS = "results.h5"
MODEL = "model.safetensors"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
KEPT_CHECKPOINTS = 2
"""Checkpoints that are kept: the newest is not known to be good before a step from it had a finite loss."""
TENSORBOARD = "tensorboard"

_WRITTEN = (
    *(RESULTS, segments_folder(Path(RESULTS)).name, rank_file(Path(RESULTS), 0).parent.name),
    *(CONFIG, LAUNCHES, MODEL, ADAPTER, CHECKPOINTS, TENSORBOARD),
)
"""What a run writes and would write over."""

_RECORDED = frozenset(
    [
        "PATH", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "OMP_PROC_BIND",
        "OMP_PLACES", "MKL_NUM_THREADS", "KMP_AFFINITY", "SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_JOB_NAME",
        "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_JOB_START_TIME",
        "SLURM_JOB_END_TIME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_NNODES",
        "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE",
        "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_STEP_ID",
        "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",
        "SLURM_CPU_BIND", "SLURM_DISTRIBUTION", "SLURM_MPI_TYPE", "PMI_RANK", "PMI_SIZE", "PMI_JOBID", "PMIX_RANK",
        "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_MCA_btl", "OMPI_MCA_pml", "OMPI_MCA_mtl", "OMPI_MCA_btl_tcp_if_include",
        "OMPI_MCA_oob_tcp_if_include", "MPICH_GPU_SUPPORT_ENABLED", "MPICH_OFI_NIC_POLICY", "MPIR_CVAR_CH4_NETMOD",
        "MPIR_CVAR_NOLOCAL", "I_MPI_FABRICS", "I_MPI_OFI_PROVIDER", "I_MPI_PMI_LIBRARY", "UCX_TLS", "UCX_NET_DEVICES",
        "FI_PROVIDER", "FI_CXI_RX_MATCH_MODE", "FI_TCP_IFACE", "GLOO_SOCKET_IFNAME", "NCCL_ALGO", "NCCL_BUFFSIZE",
        "NCCL_CROSS_NIC", "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_IB_GID_INDEX", "NCCL_IB_HCA", "NCCL_IB_TIMEOUT",
        "NCCL_NET", "NCCL_NET_GDR_LEVEL", "NCCL_NVLS_ENABLE", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL",
        "NCCL_PROTO", "NCCL_SHM_DISABLE", "NCCL_SOCKET_IFNAME", "NCCL_TOPO_FILE", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "TORCH_NCCL_BLOCKING_WAIT", "TORCH_DISTRIBUTED_DEBUG", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
        "TORCHELASTIC_MAX_RESTARTS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG",
        "HDF5_USE_FILE_LOCKING", "HF_HUB_OFFLINE",
    ]
)  # fmt: skip
"""Variables that steer launchers and libraries. They are named one by one, since others contain whole environments
and logins."""


def check_possible(folder: Path) -> None:
    """Raises ConfigError where a run could not make its folder, or write in it."""
    if why := why_not_writable(folder):
        raise _unwritable(folder, why)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """For code that writes into a run's folder: raises ConfigError in place of OSError."""
    try:
        yield
    except OSError as error:
        raise _unwritable(folder, error.strerror or str(error)) from error


def _unwritable(folder: Path, why: str) -> ConfigError:
    return ConfigError(
        f"run.folder={shown(str(folder.parent))}: no run can be written there ({why}); choose another folder "
        f"(run.folder) or name (run.name), or make room"
    )


def check_free(folder: Path, *, may_hold_a_start: bool) -> None:
    """Raises ConfigError where a new run would overwrite files in its folder. may_hold_a_start: whether files of a
    run that ended before its first step may be there.
    """
    written = (MODEL, ADAPTER, CHECKPOINTS) if may_hold_a_start else _WRITTEN
    there = [name for name in written if os.path.lexists(folder / name)]
    if there:
        raise ConfigError(
            f"{folder / there[0]} exists already and is not overwritten: choose another output folder (run.name or "
            f"run.folder), train.resume=auto to go on with the run in this one, or delete the folder to begin anew"
        )


def check_ours(folder: Path) -> None:
    """Raises ConfigError where a run is to go on in a folder whose files are not those of a run."""
    there = [name for name in (CONFIG, MODEL, ADAPTER) if os.path.lexists(folder / name)]
    if there and not (folder / LAUNCHES).is_file():
        raise ConfigError(
            f"{folder / there[0]}: not of a run, since {LAUNCHES} is absent beside it, and not overwritten; choose "
            f"another output folder (run.name or run.folder)"
        )


def record_launch(config: RunConfig, control: Control, environment: Mapping[str, Any], start: str) -> None:
    """Writes a line on this start and the configuration; on rank 0. `start` says from where the run goes on."""
    folder = config.run_folder
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "start": start,
        "hosts": control.hosts,
        "code": describe_code(),
        "environment": dict(environment),
        "variables": recorded_variables(os.environ),
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # First, since by this file a folder is known as a run's.
        atomic.append_line(folder / LAUNCHES, json.dumps(line))
        atomic.write(folder / CONFIG, config.to_yaml())


def saved_config(folder: Path) -> dict[str, Any] | None:
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
    return {name: scrubbed(value) for name, value in sorted(environ.items()) if name in _RECORDED}


def _commit(git: Path) -> str:
    """The commit of HEAD, read from git's files, since no process may be forked once MPI runs."""
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


class _SafeFormatter(logging.Formatter):
    """Without secrets and control characters, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return scrubbed(printable(super().format(record)))


def open_log(folder: Path, rank: int) -> None:
    """Sends this rank's log records, warnings and fatal signals' tracebacks to logs/rank-R.log as well."""
    path = folder / "logs" / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    handler = logging.StreamHandler(file)
    handler.setFormatter(_SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
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
