"""A run that hangs ends in bounded time in every phase, by itself and when it is told to stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from d2ft_hpc.errors import UNFINISHED
from tests.distributed.launching import LIMIT_SECONDS, REPOSITORY, at_once, mpirun, wait_for_line

HOST = socket.gethostname()
pytestmark = pytest.mark.full
QUICK = ["configs/demo.yaml", "plan.planner=paper", "train.checkpoint_every=2 steps", "train.steps_share=0.5"]


def start(folder: Path, phase: str, *overrides: str, ranks: int = 1) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "tests.distributed.hanging_phase",
        "train",
        *QUICK,
        f"run.folder={folder}",
    ]
    before = [mpirun(), "-n", str(ranks)] if ranks > 1 else []
    engine = ["engine.name=plain"] if ranks == 1 else []
    return subprocess.Popen(
        [*before, *command, *engine, *overrides],
        cwd=REPOSITORY,
        env={**os.environ, "HANGS_IN": phase, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(job: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """The status, and what the package's own lines say, except what skipping heads costs."""
    told = job.communicate(timeout=LIMIT_SECONDS)[0].splitlines()
    own = [line for line in told if line.startswith(("d2ft-hpc: ", "[rank "))]
    return job.returncode, [line for line in own if "warning: the plan skips heads" not in line]


@pytest.mark.parametrize("phases", [("set-up", "evaluation"), ("scoring", "saving a checkpoint")])
def test_a_hang_in_any_phase_is_named_and_ends_the_run(tmp_path: Path, phases: tuple[str, str]) -> None:
    def hang(phase: str) -> None:
        status, messages = ended(start(tmp_path / phase, phase, "launch.stall_seconds=12"))
        assert status == UNFINISHED
        (message,) = messages
        assert message.startswith(
            f"[rank 0 on {HOST}] error: rank 0 on {HOST} hangs in {phase}: nothing has moved on for 12 s "
            f"(launch.stall_seconds); at {REPOSITORY / 'tests/distributed/hanging_phase.py'}:"
        )

    at_once(*(partial(hang, phase) for phase in phases))


def test_a_run_that_hangs_before_its_first_step_can_be_stopped(tmp_path: Path) -> None:
    def stop(ranks: int) -> None:
        job = start(tmp_path / str(ranks), "evaluation", ranks=ranks)
        wait_for_line(job, "it hangs")
        job.send_signal(signal.SIGTERM)
        status, messages = ended(job)
        assert status == UNFINISHED
        (message,) = messages
        assert "d2ft-hpc: stopped before the first step by signal TERM to rank " in message
        assert message.endswith(": start it again with train.resume=auto to go on")

    at_once(partial(stop, 1), partial(stop, 2))
