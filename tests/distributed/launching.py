"""Starts real ranks for tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def mpirun() -> str:
    """The mpirun that belongs to this Python's MPI."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    assert found, "no mpirun: pip install 'd2ft-hpc[mpi]'"
    return found


def run(
    arguments: list[str],
    *,
    ranks: int = 1,
    timeout_seconds: float = 120,
    cwd: Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` alone or on MPI ranks of one thread each."""
    command = [sys.executable, *arguments]
    if ranks > 1:
        command = [mpirun(), "-n", str(ranks), *command]
    return run_command(command, timeout_seconds=timeout_seconds, cwd=cwd, **environment)


def run_command(
    command: list[str], *, timeout_seconds: float, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a launcher's whole command line, from the repository unless `cwd` is given."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        command,
        cwd=cwd or REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )


def results_of(module: str, *arguments: str, ranks: int, timeout_seconds: float = 240) -> dict[str, Any]:
    """What a module of checks printed as JSON after the word RESULTS."""
    finished = run(["-m", module, *arguments], ranks=ranks, timeout_seconds=timeout_seconds)
    lines = [line for line in finished.stdout.splitlines() if line.startswith("RESULTS ")]
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(lines) == 1, finished.stdout + finished.stderr
    results: dict[str, Any] = json.loads(lines[0].removeprefix("RESULTS "))
    return results
