"""Which launcher started this process, as which rank, told from environment variables alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from d2ft_hpc.errors import LaunchError
from d2ft_hpc.safe_text import shown


@dataclass(frozen=True)
class Launcher:
    """The variables in which a launcher tells a process its place; of several, the first one that is set counts.

    `marker` is the variable whose presence shows that this launcher started the process.
    """

    marker: str
    rank: tuple[str, ...]
    local_rank: tuple[str, ...]
    world_size: tuple[str, ...]
    uses_mpi: bool = True
    also_needs: tuple[str, ...] = ()


def _torch(marker: str) -> Launcher:
    rendezvous = ("MASTER_ADDR", "MASTER_PORT")
    return Launcher(
        marker, ("RANK",), ("LOCAL_RANK",), ("WORLD_SIZE",), uses_mpi=False, also_needs=rendezvous
    )


# The first row whose marker is set wins. A launcher inside another one (torchrun in mpirun, mpirun in a Slurm
# step) inherits the outer one's variables, so the rows go from the innermost launcher outwards.
LAUNCHERS: dict[str, Launcher] = {
    "torchrun": _torch("TORCHELASTIC_RUN_ID"),
    "deepspeed": _torch("CROSS_RANK"),
    "torch.distributed variables": _torch("RANK"),
    "Open MPI": Launcher(
        marker="OMPI_COMM_WORLD_RANK",
        rank=("OMPI_COMM_WORLD_RANK",),
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        world_size=("OMPI_COMM_WORLD_SIZE",),
    ),
    "MPICH": Launcher(  # every PMI-1 and PMI-2 launcher: Hydra, Intel MPI, Cray PALS, srun --mpi=pmi2
        marker="PMI_RANK",
        rank=("PMI_RANK",),
        local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID"),
        world_size=("PMI_SIZE",),
    ),
    "PMIx": Launcher(  # srun --mpi=pmix; PMIx itself puts neither size nor local rank into the environment
        marker="PMIX_RANK",
        rank=("PMIX_RANK",),
        local_rank=("SLURM_LOCALID",),
        world_size=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    ),
    "srun": Launcher(
        marker="SLURM_STEP_ID",
        rank=("SLURM_PROCID",),
        local_rank=("SLURM_LOCALID",),
        world_size=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    ),
}
SINGLE_PROCESS = "single process"

# Slurm numbers the batch script, the shell of salloc and the like as steps from here up (slurm.h).
_FIRST_RESERVED_STEP = 0xFFFFFFF0
_LAST_PORT = 65535
_ADDRESSES = (
    "HF_ENDPOINT",
    *(f"{scheme}_proxy" for scheme in ("http", "https", "all")),
    *(f"{scheme}_PROXY" for scheme in ("HTTP", "HTTPS", "ALL")),
)


@dataclass(frozen=True)
class LaunchEnvironment:
    """What the launcher promised: this process is rank `rank` of `world_size`, and number `local_rank` on its
    host."""

    launcher: str
    rank: int
    local_rank: int
    world_size: int
    uses_mpi: bool


def detect(environ: Mapping[str, str] = os.environ) -> LaunchEnvironment:
    """Read the launch environment; nothing is imported, opened or changed.

    Complete torch.distributed variables win over an MPI launcher, that wins over Slurm. A batch script or an
    salloc shell has SLURM_NTASKS but is no step, so it counts as a single process, like plain python.

    Raises LaunchError if variables are missing, are no numbers, or contradict each other.
    """
    _check_port(environ)
    _check_addresses(environ)
    for name, launcher in LAUNCHERS.items():
        if environ.get(launcher.marker) and not _is_shell_of_an_allocation(launcher, environ):
            return _read(name, launcher, environ)
    if environ.get("WORLD_SIZE") or environ.get("LOCAL_RANK"):
        _read("torch.distributed variables", LAUNCHERS["torch.distributed variables"], environ)
    return LaunchEnvironment(SINGLE_PROCESS, rank=0, local_rank=0, world_size=1, uses_mpi=False)


def likely_rank(environ: Mapping[str, str] = os.environ) -> int:
    """This process's rank where `detect` refuses the environment, as far as any launcher says; else 0."""
    told = (environ.get(name, "") for launcher in LAUNCHERS.values() for name in launcher.rank)
    return max((int(text) for text in told if re.fullmatch("[0-9]{1,9}", text)), default=0)


def _is_shell_of_an_allocation(launcher: Launcher, environ: Mapping[str, str]) -> bool:
    return launcher.marker == "SLURM_STEP_ID" and _number("SLURM_STEP_ID", environ) >= _FIRST_RESERVED_STEP


def _read(name: str, launcher: Launcher, environ: Mapping[str, str]) -> LaunchEnvironment:
    wanted = [launcher.rank, launcher.local_rank, launcher.world_size, *((v,) for v in launcher.also_needs)]
    missing = [" or ".join(names) for names in wanted if not any(environ.get(n) for n in names)]
    if missing:
        raise LaunchError(
            f"the environment is half set for {name}: missing {', '.join(missing)}. Set what is missing on"
            " every rank, or unset the rest, or start with mpirun, srun, torchrun or deepspeed."
        )
    rank, local_rank, world_size = (
        _number(next(n for n in names if environ.get(n)), environ) for names in wanted[:3]
    )
    if not (0 <= rank < world_size and 0 <= local_rank < world_size):
        raise LaunchError(
            f"{name} says rank {rank}, local rank {local_rank} of {world_size} ranks, which cannot be. Look"
            " for variables left over in the environment from another launcher."
        )
    if environ.get("WORLD_SIZE") and (torch_size := _number("WORLD_SIZE", environ)) != world_size:
        raise LaunchError(
            f"WORLD_SIZE={torch_size} is set, but {name} started {world_size} ranks. Unset WORLD_SIZE or"
            f" start {torch_size} ranks."
        )
    return LaunchEnvironment(name, rank, local_rank, world_size, launcher.uses_mpi)


def _check_port(environ: Mapping[str, str]) -> None:
    """Checks the port of torch.distributed's rendezvous, which is read later under every launcher."""
    if environ.get("MASTER_PORT") and not 0 <= _number("MASTER_PORT", environ) <= _LAST_PORT:
        raise LaunchError(
            f"environment variable MASTER_PORT={environ['MASTER_PORT']} is no port: set a number from 1 to "
            f"{_LAST_PORT}, or unset it"
        )


def _check_addresses(environ: Mapping[str, str]) -> None:
    """Checks the addresses of hubs and proxies: libraries that cannot read one show all of it, with its password."""
    for name in _ADDRESSES:
        try:
            _ = urlsplit(environ.get(name, "")).port
        except ValueError:
            raise LaunchError(
                f"environment variable {name} is no address: write / @ : of a password as %2F %40 %3A, or unset it"
            ) from None


def _number(name: str, environ: Mapping[str, str]) -> int:
    text = environ[name]
    if not re.fullmatch(r"-?[0-9]{1,12}", text):
        raise LaunchError(
            f"environment variable {name}={shown(text)} is not a whole number: correct it, or unset it"
        )
    return int(text)
