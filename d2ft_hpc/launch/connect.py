"""Join the ranks that a launcher started: check their number, start torch.distributed, return the control."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

from d2ft_hpc.errors import LaunchError
from d2ft_hpc.launch.agree import AgreedError, agreed
from d2ft_hpc.launch.control import Control, SoloControl
from d2ft_hpc.launch.environment import LAUNCHERS, LaunchEnvironment
from d2ft_hpc.launch.gloo_control import GlooControl
from d2ft_hpc.launch.mpi_control import MpiControl

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined,unused-ignore]

    from d2ft_hpc.launch.authenticated_socket import Endpoint

DeviceType = Literal["cpu", "cuda"]


def device_type_of(asked: Literal["auto", "cpu", "cuda"], setting: str = "engine.device=") -> DeviceType:
    """The device type that is asked for; "auto" is CUDA where torch sees a GPU. Raises LaunchError for "cuda" where
    it sees none. setting: how the user asks, for messages."""
    if asked == "cpu":
        return asked
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise LaunchError(
            f"{setting}cuda: torch {torch.__version__} sees no GPU here; set {setting}cpu, or start on a GPU node with "
            f"a CUDA build of torch"
        )
    return "cpu"


def connect(
    environment: LaunchEnvironment,
    *,
    device_type: Literal["auto", "cpu", "cuda"],
    device_setting: str = "engine.device=",
    timeout_seconds: float = 25.0,
    collective_timeout_seconds: float = 1800.0,
) -> Control:
    """Meet the other ranks and start torch.distributed's default process group; every rank must call this.

    MPI starts before anything large is loaded, torch included: under Slurm's pmi2, MPICH's start may fail after it.
    The group is gloo for "cpu" and gloo plus NCCL for "cuda", whose current device is set as well; "auto" is what
    `device_type_of` says, for whose messages `device_setting` is. RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT are put into os.environ where absent. LOCAL_RANK is 0 for a process that sees a single GPU, since it
    serves as the index of the device. A default process group that exists already is used, and left open at the end.
    Call `detect` before: afterwards it sees the variables set here.

    `timeout_seconds` is how long the ranks may take to meet; `collective_timeout_seconds` is the deadline of
    every later collective of the control plane and of torch.distributed.

    Raises LaunchError if the number of ranks is not what the launcher promised, if ranks are missing, or if
    they cannot reach each other.
    """
    mpi = None
    if environment.uses_mpi and environment.world_size > 1:
        mpi = MpiControl(
            environment.local_rank, init_timeout_seconds=timeout_seconds, timeout_seconds=timeout_seconds
        )
        _check_world(environment, mpi)

    from torch import distributed

    with nullcontext() if mpi is None else agreed(mpi, "choosing the devices"):
        device_type = device_type_of(device_type, device_setting)
        device_index = _choose_device(device_type, environment.local_rank)
    adopted = distributed.is_initialized()
    if adopted and distributed.get_world_size() != environment.world_size:
        raise LaunchError(
            f"torch.distributed already runs with {distributed.get_world_size()} ranks, but the launcher"
            f" ({environment.launcher}) started {environment.world_size}"
        ) from AgreedError()

    control = SoloControl() if environment.world_size == 1 else mpi
    if not adopted:
        from d2ft_hpc.launch.rendezvous import meet_at_master, start_process_group

        if control is None:
            store, endpoint = meet_at_master(environment, timeout_seconds)
        else:
            store, endpoint = _meet(control, environment, device_index)
        with nullcontext() if mpi is None else agreed(mpi, "starting torch.distributed"):
            start_process_group(
                store,
                environment,
                "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
                one_host=endpoint.port is None,
                timeout_seconds=timeout_seconds,
                collective_timeout_seconds=collective_timeout_seconds,
            )
    if control is None:
        return GlooControl(
            environment.local_rank,
            timeout_seconds=collective_timeout_seconds,
            owns_process_group=not adopted,
        )
    control.owns_process_group = not adopted
    control.timeout_seconds = collective_timeout_seconds
    return control


def _choose_device(device_type: DeviceType, local_rank: int) -> int:
    """Make this process's GPU the current one and return the value for LOCAL_RANK."""
    if device_type == "cpu":
        return local_rank
    import torch

    count = torch.cuda.device_count()
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise LaunchError(
            f"local rank {local_rank} has no GPU: this host shows {count} GPUs. Start at most {count} ranks a"
            " node."
        )
    torch.cuda.set_device(index)
    return index


def _check_world(environment: LaunchEnvironment, control: MpiControl) -> None:
    if control.world_size == environment.world_size:
        return
    names = LAUNCHERS[environment.launcher].world_size
    promise = " or ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    if environment.launcher in ("srun", "PMIx"):
        fix = (
            "Start with `srun --mpi=pmi2` for MPICH and Intel MPI or `srun --mpi=pmix` for Open MPI (`srun"
            " --mpi=list` shows what Slurm has), or with the mpirun of that MPI"
        )
    else:
        fix = (
            f"Start with the mpirun that belongs to {control.library}, or install an mpi4py that loads the"
            " MPI of your mpirun"
        )
    raise LaunchError(
        f"{environment.launcher} promised {environment.world_size} ranks ({promise}), but the MPI library"
        f" that mpi4py loaded ({control.library}) sees a world of {control.world_size}: launcher and library"
        f" do not talk to each other, as when the mpirun of one MPI meets the libmpi of another. {fix}."
    ) from AgreedError()


def _meet(control: Control, environment: LaunchEnvironment, device_index: int) -> tuple[Store, Endpoint]:
    """The store of all ranks and where they met; sets the environment of torch.distributed."""
    from d2ft_hpc.launch.rendezvous import meet_over

    store, endpoint, (address, port) = meet_over(control, int(os.environ.get("MASTER_PORT") or 0))
    for name, value in {
        "RANK": environment.rank,
        "WORLD_SIZE": environment.world_size,
        "LOCAL_RANK": device_index,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }.items():
        os.environ.setdefault(name, str(value))
    return store, endpoint
