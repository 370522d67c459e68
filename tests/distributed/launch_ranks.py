"""The program that test_launch.py starts on several ranks: python launch_ranks.py SCENE [SECONDS]."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset

from d2ft_hpc.errors import DataError, LaunchError, ResultsError
from d2ft_hpc.launch import Control, agreed, connect, detect, run_guarded, share
from d2ft_hpc.launch.gloo_control import GlooControl
from d2ft_hpc.launch.mpi_control import MpiControl
from d2ft_hpc.launch.watch import Watch
from tests.distributed.attacker import listening, sockets_of

SCENE = sys.argv[1]
SECONDS = float(sys.argv[2]) if len(sys.argv) > 2 else 120.0


class SeesMpi(Dataset[bool]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> bool:
        return any(name.startswith("mpi4py") for name in sys.modules)


class Corrupting:
    """A control whose rank 1 receives a flipped bit in every broadcast."""

    def __init__(self, control: Control) -> None:
        self.control = control

    def __getattr__(self, name: str) -> object:
        return getattr(self.control, name)

    def broadcast(self, payload: bytes | None) -> bytes:
        data = self.control.broadcast(payload)
        return bytes([data[0], data[1] ^ 1]) + data[2:] if self.control.rank == 1 else data


def error_of(step: Callable[[], object], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        step()
    assert caught.type is kind
    return str(caught.value)


def check_collectives(control: Control) -> None:
    rank, world_size = control.rank, control.world_size
    for data in (b"", b"\0\xff" * 70_000):
        assert control.broadcast(data if rank == 0 else None) == data
        assert control.broadcast(data if rank == 0 else b"another, longer or shorter") == data
    lengths = [0, 5, 100_000, 1][:world_size]
    for sizes in (lengths, [0] * world_size, [3, 0, 17, 1][:world_size]):
        assert control.all_gather(bytes([rank]) * sizes[rank]) == [
            bytes([r]) * n for r, n in enumerate(sizes)
        ]
    control.barrier(SECONDS)
    assert control.hosts == (control.host,) * world_size
    total = torch.ones(3)
    distributed.all_reduce(total)
    assert total.tolist() == [world_size] * 3


def check_gathering(control: Control) -> None:
    """Beginning to gather waits for no rank, not even where the ranks' first gather has to connect them."""
    last = control.world_size - 1
    control.barrier(SECONDS)
    if control.rank == last:
        time.sleep(2)
    started = time.monotonic()
    gathers = [control.start_gather(bytes([step, control.rank])) for step in range(3)]
    assert time.monotonic() - started < 1
    if control.rank == 0:
        assert gathers[0].wait(0.1) is None
    worked = time.thread_time()
    every = [gather.wait(SECONDS) for gather in gathers]
    if isinstance(control, GlooControl):
        assert (
            time.thread_time() - worked < 0.03
        )  # it sleeps; looking all the time, many ranks would slow each other
    if control.rank == 0:
        assert every == [bytes(b for r in range(last + 1) for b in (step, r)) for step in range(3)]
        assert time.monotonic() - started > 1


def check_agreement(control: Control) -> None:
    rank, host = control.rank, control.host
    assert share(control, lambda: b"plan" * 1000, "the plan") == b"plan" * 1000

    def one_fails() -> None:
        with agreed(control, "reading"):
            if rank == 1:
                raise DataError("no such folder")

    def all_fail() -> None:
        with agreed(control, "outer"), agreed(control, "reading"):
            raise DataError("no such folder")

    def differently() -> None:
        with agreed(control, "reading"):
            raise DataError("torn") if rank == 0 else FileNotFoundError(2, "gone", "/x")

    def make() -> bytes:
        raise ValueError("NaN scores")

    assert error_of(one_fails, DataError) == f"reading: no such folder (rank 1 on {host})"
    assert error_of(all_fail, DataError) == "reading: no such folder (all ranks)"
    others = "rank 1" if control.world_size == 2 else f"ranks 1-{control.world_size - 1}"
    assert error_of(differently, LaunchError) == (
        f"reading: torn (rank 0 on {host}); FileNotFoundError: [Errno 2] gone: '/x' ({others} on {host})"
    )
    assert error_of(lambda: share(control, make, "solving"), LaunchError) == (
        f"solving: ValueError: NaN scores (rank 0 on {host})"
    )
    deviation = error_of(lambda: share(Corrupting(control), lambda: b"plan", "the plan"), LaunchError)  # type: ignore[arg-type]
    assert deviation.startswith(f"the plan: rank 1 on {host} received other bytes"), deviation


def check_deepspeed(control: Control) -> None:
    import deepspeed  # type: ignore[import-untyped,unused-ignore]
    import deepspeed.comm  # type: ignore[import-untyped,unused-ignore]

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for over a minute otherwise
    group = distributed.group.WORLD
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    assert distributed.group.WORLD is group, "DeepSpeed started a process group of its own"
    assert deepspeed.comm.get_world_size() == control.world_size
    total = torch.ones(1)
    deepspeed.comm.all_reduce(total)
    assert total.item() == control.world_size


def check_workers(control: Control) -> None:
    assert ("mpi4py.MPI" in sys.modules) is isinstance(control, MpiControl)
    loader = DataLoader(SeesMpi(), num_workers=2, multiprocessing_context="spawn")
    assert [bool(batch) for batch in loader] == [False] * 4
    check_collectives(control)


def check_under_attack(control: Control) -> None:
    """Groups and collectives for two seconds, and where this rank listens meanwhile."""
    with Watch(control):
        for _ in range(20):
            group = distributed.new_group(backend="gloo")
            total = torch.ones(3)
            distributed.all_reduce(total, group=group)
            assert total.tolist() == [control.world_size] * 3
            check_collectives(control)
            time.sleep(0.1)
        for name, address, port in listening(sockets_of(Path("/proc/self"))):
            print(f"rank {control.rank} listens: {name} {address} {port}", flush=True)


def play(control: Control) -> int | None:
    check_collectives(control)
    if "agreement" in SCENE:
        check_gathering(control)
        check_agreement(control)
    if "deepspeed" in SCENE:
        check_deepspeed(control)
    if "attacked" in SCENE:
        check_under_attack(control)
    if "workers" in SCENE:
        check_workers(control)
    if SCENE == "user error":
        with agreed(control, "reading the data"):
            raise DataError("no such folder")
    if SCENE == "bug" and control.rank == 1:
        raise KeyError("a bug\nin two lines")
    if SCENE == "lonely error" and control.rank == 1:
        raise ResultsError("the disk is full")
    if SCENE == "killed" and control.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if SCENE == "interrupt" and control.rank == 1:
        # Ignored where the tests run in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    if SCENE == "hang" and control.rank == 1:
        time.sleep(60)
    if SCENE in ("bug", "lonely error", "killed", "hang", "interrupt"):
        control.barrier(2 if SCENE == "hang" else 60)
    print(f"rank {control.rank} ok, port {os.environ['MASTER_PORT']}, {type(control).__name__}", flush=True)
    return None


def main() -> int:
    environment = detect()
    if SCENE == "absent" and environment.rank == 1:
        return 3
    control = connect(environment, device_type="cpu", timeout_seconds=SECONDS, collective_timeout_seconds=120)
    folder = os.environ.get("RUN_FOLDER")
    return run_guarded(control, lambda: play(control), run_folder=Path(folder) if folder else None)


if __name__ == "__main__":
    sys.exit(run_guarded(None, main))
