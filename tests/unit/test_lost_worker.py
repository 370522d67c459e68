"""A data worker that is killed is told in one way, whenever it happens."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d2ft_hpc.command import on_ranks
from d2ft_hpc.config import read_config
from d2ft_hpc.data.workers import automatic_workers, loader_of, read_with
from d2ft_hpc.errors import UNFINISHED, LostWorkerError
from d2ft_hpc.launch.agree import run_guarded
from d2ft_hpc.launch.children import kill_children
from d2ft_hpc.launch.cores import share_of_cores
from d2ft_hpc.launch.signals import StopSignals


class Killed:
    """Batches of numbers, until the one at which the process that reads it gets a signal."""

    def __init__(self, number: signal.Signals) -> None:
        self._signal = number

    def __getitems__(self, keys: Sequence[int]) -> torch.Tensor:
        if 5 in keys:
            os.kill(os.getpid(), self._signal)
        return torch.tensor(list(keys))


@pytest.mark.parametrize(
    ("number", "fix"), [(signal.SIGKILL, "use fewer data.workers"), (signal.SIGBUS, "/dev/shm is too small")]
)
def test_a_killed_worker_is_named_with_the_fix(
    number: signal.Signals, fix: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    batches = [[i] for i in range(12)]
    loader = loader_of(Killed(number), batches, num_workers=2, persistent=False)
    read = []

    def read_all() -> None:
        for batch in read_with(loader):
            read.append(int(batch))

    with pytest.raises(
        LostWorkerError, match=rf"^a data worker \(process \d+\) was killed by {number.name}: .*"
    ):
        read_all()
    assert read == list(range(len(read)))
    assert len(read) <= 5

    def lost() -> None:
        raise LostWorkerError(f"a data worker (process 1) was killed by {number.name}: {fix}")

    assert run_guarded(None, lost, run_folder=tmp_path) == UNFINISHED
    assert fix in capfd.readouterr().err


def test_children_are_killed_whatever_they_block() -> None:
    context = multiprocessing.get_context("forkserver")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        child = context.Process(target=signal.pause, daemon=True)
        child.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    kill_children()
    child.join(10)
    assert child.exitcode == -signal.SIGKILL


def end_with_a_worker_left() -> None:
    context, signals = multiprocessing.get_context("forkserver"), StopSignals(["TERM"])

    def leave_one(*_: Any) -> int:
        child = context.Process(target=signal.pause, daemon=True)
        child.start()
        time.sleep(1.0)  # it has to be there before this process ends
        return 0

    raise SystemExit(
        on_ranks(read_config(Path("configs/demo.yaml"), ["engine.device=cpu"]), leave_one, signals)
    )


def test_a_finished_run_ends_though_a_worker_is_left() -> None:
    command = "from tests.unit.test_lost_worker import end_with_a_worker_left; end_with_a_worker_left()"
    assert subprocess.run([sys.executable, "-c", command], timeout=120).returncode == 0


class OwnMask:
    """Batches of which signals the process that reads them blocks, a bit each."""

    def __getitems__(self, keys: Sequence[int]) -> torch.Tensor:
        return torch.tensor(sum(1 << number for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())))


def print_masks_of_workers() -> None:
    StopSignals(["USR2", "TERM"])
    for mask in read_with(loader_of(OwnMask(), [[0], [1]], num_workers=2, persistent=False)):
        print(int(mask) >> signal.SIGTERM & 1, int(mask) >> signal.SIGUSR2 & 1)


@pytest.mark.full
def test_workers_live_on_when_their_whole_group_is_told_to_stop() -> None:
    """As Slurm and `timeout` do it; in a process of its own, since signals are blocked for good."""
    script = f"from {__name__} import print_masks_of_workers; print_masks_of_workers()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["1 1", "1 1"], done.stderr


def test_workers_by_themselves_fit_the_cores_and_the_shared_memory() -> None:
    assert [automatic_workers(cores, 1, batch_bytes=1) for cores in (0.5, 1, 8, 64)] == [0, 0, 7, 16]
    free = shutil.disk_usage("/dev/shm").free
    assert automatic_workers(8, 1, batch_bytes=free // 27) == 4
    assert automatic_workers(8, 2, batch_bytes=free // 27) == 2
    assert automatic_workers(8, 1, batch_bytes=free) == 0


def test_ranks_share_the_cores_that_they_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bound to two cores each, two left on the other four, and one on another host."""
    of_ranks = [[0, 1], [2, 3], [4, 5, 6, 7], [4, 5, 6, 7], [0, 1, 2, 3]]
    hosts = ("here", "here", "here", "here", "there")
    found = []
    for host, own in zip(hosts, of_ranks, strict=True):
        control = SimpleNamespace(
            host=host, hosts=hosts, all_gather=lambda _: [json.dumps(each).encode() for each in of_ranks]
        )
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, own=own: set(own))
        found.append(share_of_cores(control))
    assert found == [2, 2, 2, 2, 4]
