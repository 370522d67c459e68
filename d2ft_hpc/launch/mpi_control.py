"""The control plane over MPI, with deadlines for its start and its end, too."""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from d2ft_hpc.errors import LaunchError, LostRankError
from d2ft_hpc.launch.async_gather import MpiGather, PendingGather
from d2ft_hpc.launch.control import (
    GRACE_SECONDS,
    describe_ranks,
    destroy_process_group,
    print_line,
)

_FINALIZE_SECONDS = 30.0


Collective = TypeVar("Collective", bound=Callable[..., Any])


def _mpi_errors_are_lost_ranks(collective: Collective) -> Collective:
    """Decorates a method of MpiControl: MPI itself fails only where another rank is gone."""

    @wraps(collective)
    def guarded(self: MpiControl, *arguments: Any) -> Any:
        try:
            return collective(self, *arguments)
        except self._mpi.Exception as error:
            time.sleep(GRACE_SECONDS)  # the rank that failed knows why, and the launcher ends the others
            reason = str(error).splitlines()[0]
            raise LostRankError(
                f"lost the connection to a rank: it ended or cannot be reached ({reason})"
            ) from error

    return guarded  # type: ignore[return-value]


class MpiControl:
    """The control plane over a duplicate of MPI_COMM_WORLD.

    `init_timeout_seconds` is the deadline of MPI_Init, `timeout_seconds` that of `broadcast` and
    `all_gather`. MPI is not finalized when a process exits without `close`, so that launchers see a rank that
    ends early as a failure and end the others.

    Raises LaunchError if mpi4py or its MPI library cannot be loaded.
    """

    def __init__(self, local_rank: int, *, init_timeout_seconds: float, timeout_seconds: float) -> None:
        self._mpi = _import_mpi()
        self._owns_mpi = not self._mpi.Is_initialized()
        with _start_deadline(init_timeout_seconds) if self._owns_mpi else nullcontext():
            if self._owns_mpi:
                # Control messages come from the main thread alone.
                self._mpi.Init_thread(self._mpi.THREAD_FUNNELED)
            self._comm = self._mpi.COMM_WORLD.Dup()
            self._gathering = self._comm.Dup()
        self.timeout_seconds = timeout_seconds
        self._unfinished: list[Any] = []  # MPI still writes into their buffers
        self._closed = False
        self.owns_process_group = False
        self.rank: int = self._comm.Get_rank()
        self.local_rank = local_rank
        self.world_size: int = self._comm.Get_size()
        self.host = socket.gethostname()
        self.hosts: tuple[str, ...] = ("an unknown host",) * self.world_size
        self.hosts = tuple(host.decode() for host in self.all_gather(self.host.encode()))
        if self._owns_mpi:
            _forget_names_of_shared_memory()

    @property
    def library(self) -> str:
        """Name and version of the MPI library, such as "MPICH 5.0.2"."""
        vendor, version = self._mpi.get_vendor()
        return f"{vendor} {'.'.join(map(str, version))}"

    @property
    def start_is_fragile(self) -> bool:
        """Whether MPI may fail to start another time, as `FRAGILE_START` tells."""
        many_hosts = len(set(self.hosts)) > 1
        return many_hosts and _has_fragile_launch() and "ch4:ucx" in self._mpi.Get_library_version()

    @_mpi_errors_are_lost_ranks
    def broadcast(self, payload: bytes | None) -> bytes:
        self.barrier(self.timeout_seconds)
        deadline = time.monotonic() + self.timeout_seconds
        data = payload or b""
        size = bytearray(len(data).to_bytes(8, "little"))
        self._wait(self._comm.Ibcast([size, self._mpi.BYTE]), deadline)
        buffer = bytearray(data) if self.rank == 0 else bytearray(int.from_bytes(size, "little"))
        self._wait(self._comm.Ibcast([buffer, self._mpi.BYTE]), deadline)
        return bytes(buffer)

    @_mpi_errors_are_lost_ranks
    def all_gather(self, payload: bytes) -> list[bytes]:
        self.barrier(self.timeout_seconds)
        deadline = time.monotonic() + self.timeout_seconds
        byte = self._mpi.BYTE
        own_size, all_sizes = len(payload).to_bytes(8, "little"), bytearray(8 * self.world_size)
        self._wait(self._comm.Iallgather([own_size, byte], [all_sizes, 8, byte]), deadline)
        sizes = [int.from_bytes(all_sizes[8 * r : 8 * r + 8], "little") for r in range(self.world_size)]
        starts = [0, *accumulate(sizes[:-1])]
        gathered = bytearray(sum(sizes))
        self._wait(self._comm.Iallgatherv([payload, byte], [gathered, (sizes, starts), byte]), deadline)
        return [bytes(gathered[start : start + size]) for start, size in zip(starts, sizes, strict=True)]

    def start_gather(self, payload: bytes) -> PendingGather:
        return MpiGather(self._gathering, self._mpi.BYTE, payload)

    @_mpi_errors_are_lost_ranks
    def barrier(self, timeout_seconds: float) -> None:
        # Arrivals go to rank 0 one by one, because MPI_Ibarrier cannot tell who is missing.
        deadline = time.monotonic() + timeout_seconds
        byte = self._mpi.BYTE
        if self.rank == 0:
            arrivals = {r: self._comm.Irecv([bytearray(1), byte], r) for r in range(1, self.world_size)}
            pause = 0.0
            while arrivals := {r: request for r, request in arrivals.items() if not request.Test()}:
                if time.monotonic() > deadline:
                    self._unfinished += arrivals.values()
                    missing = describe_ranks(list(arrivals), self.hosts)
                    raise LostRankError(f"{missing} did not come to a barrier within {timeout_seconds:g} s")
                pause = _rest(pause)
        else:
            deadline += GRACE_SECONDS
            self._wait(self._comm.Isend([b"!", byte], 0), deadline)
        self._wait(self._comm.Ibarrier(), deadline)

    def abort(self, message: str, status: int = 1) -> NoReturn:
        print_line(f"[rank {self.rank} on {self.host}] {message}")
        time.sleep(0.5)  # mpirun drops what it has not passed on when it ends the job
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the MPI library would add a line of its own
        self._mpi.COMM_WORLD.Abort(status)
        os._exit(status)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.barrier(self.timeout_seconds)
        if self.owns_process_group:
            destroy_process_group()
        self._gathering.Free()
        self._comm.Free()
        if self._owns_mpi:
            # It waits for all ranks and holds the GIL, so that only a thread without it can end a hang.
            faulthandler.dump_traceback_later(_FINALIZE_SECONDS, exit=True)
            self._mpi.Finalize()
            faulthandler.cancel_dump_traceback_later()

    def _wait(self, request: Any, deadline: float) -> None:
        pause = 0.0
        while not request.Test():
            if time.monotonic() > deadline:
                self._unfinished.append(request)
                raise LostRankError(
                    "the ranks did not all answer over MPI in time: one of them hangs or is gone"
                )
            pause = _rest(pause)


FRAGILE_START = (
    "MPICH over UCX starts on several nodes with messages longer than Slurm's pmi2 reads at once,"
    ' which shows as "value not properly terminated in client request"',
    "export MPIR_CVAR_CH4_NETMOD=ofi",
)
"""What may happen under `srun --mpi=pmi2`, and the fix. Slurm reads 1024 bytes of a PMI-1 request (its pmi1.c), MPICH
exchanges its UCX addresses as 4096 bytes of memory and shortens only runs of zeros (its ucx_init.c)."""


_LEFT_MEMORY = (
    "; or this job's killed ranks left MPICH's shared memory behind, which has the same name again:"
    " export MPIR_CVAR_NOLOCAL=1"
)
"""Shared memory that a requeued job finds: MPICH names the memory of a node's ranks after the job and its step."""


def _may_meet_left_memory() -> bool:
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and "MPIR_CVAR_NOLOCAL" not in os.environ


def _has_fragile_launch() -> bool:
    """Slurm's pmi2 sets PMI_JOBID, MPICH's own launcher does not."""
    return "PMI_JOBID" in os.environ and "MPIR_CVAR_CH4_NETMOD" not in os.environ


def _import_mpi() -> Any:
    """mpi4py's MPI module; MPI itself is not started."""
    try:
        import mpi4py

        mpi4py.rc(initialize=False, finalize=False)
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        raise LaunchError(
            f"an MPI launcher started this process, but mpi4py cannot load MPI ({error}). Install both with"
            " `pip install mpi4py mpich`, or load your cluster's MPI module, or start with torchrun instead."
        ) from error
    return MPI


def _forget_names_of_shared_memory() -> None:
    """Removes the names of the memory that MPICH shares among a node's ranks, once all of them have mapped it: it then
    ends with the last of them, also by a kill, which otherwise leaves megabytes in /dev/shm each time."""
    with suppress(OSError):
        mapped = Path("/proc/self/maps").read_text()
        for name in set(re.findall(r"/dev/shm/mpich_shm_\w+", mapped)):
            Path(name).unlink(missing_ok=True)


@contextmanager
def _start_deadline(timeout_seconds: float) -> Iterator[None]:
    """Limits the time of MPI's start: kills this process with a message unless the block ends in time. Rank 0 gives up
    first.

    MPI_Init holds the GIL, so no thread or signal handler of this process could do it: a child process does. It ends
    when this process closes its stdin or dies.
    """
    rank_hint = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "?"
    seconds = timeout_seconds + (0 if rank_hint == "0" else GRACE_SECONDS)
    message = (
        f"[rank {rank_hint} on {socket.gethostname()}] MPI_Init did not return within {timeout_seconds:g} s:"
        " a rank that the launcher promised ended early or never started"
        + (f" ({FRAGILE_START[0]}: {FRAGILE_START[1]})" if _has_fragile_launch() else "")
        + (_LEFT_MEMORY if _may_meet_left_memory() else "")
    )
    arguments = [_WATCHDOG, str(seconds), message, str(os.getpid())]
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", *arguments], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        child.communicate()


_WATCHDOG = (
    "import os, select, sys\n"
    "if not select.select([0], [], [], float(sys.argv[1]))[0]:\n"
    "    os.write(2, sys.argv[2].encode() + b'\\n')\n"
    "    os.kill(int(sys.argv[3]), 9)\n"
)


def _rest(pause: float) -> float:
    """Sleep for `pause` seconds and return the next, longer pause (5 ms at most)."""
    time.sleep(pause)
    return min(pause + 5e-5, 5e-3)
