"""Starts real ranks for tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import pytest

REPOSITORY = Path(__file__).parents[2]
T = TypeVar("T")
Choice = Literal["quick", "full", "matrix"]
"""Of a module's checks: what `make test`, `make test-full` and `make test-matrix` run."""
LIMIT_SECONDS = 600
"""Far above what any start of a few steps takes, also on a machine busy with others: only a hang reaches it."""


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
    timeout_seconds: float = LIMIT_SECONDS,
    cwd: Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` alone or on MPI ranks of one thread each."""
    return run_command(_command(arguments, ranks), timeout_seconds=timeout_seconds, cwd=cwd, **environment)


def run_command(
    command: list[str],
    *,
    timeout_seconds: float = LIMIT_SECONDS,
    cwd: Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Runs a launcher's whole command line, from the repository unless `cwd` is given."""
    return subprocess.run(
        command,
        cwd=cwd or REPOSITORY,
        env={**_environ(), **environment},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )


def free_port() -> int:
    """One for a launcher that would take the same each time, which another job on this machine may have."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def at_once(*jobs: Callable[[], T]) -> list[T]:
    """Runs jobs side by side: the start of one rank leaves a core free. Raises what the first failing one raised."""
    with ThreadPoolExecutor() as pool:
        return [started.result() for started in [pool.submit(job) for job in jobs]]


def start(arguments: list[str], *, ranks: int) -> subprocess.Popen[str]:
    """As `run`, without waiting; stdout and stderr come together."""
    return subprocess.Popen(
        _command(arguments, ranks),
        cwd=REPOSITORY,
        env=_environ(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_line(job: subprocess.Popen[str], beginning: str) -> None:
    """Reads what the job prints until a line begins so."""
    assert job.stdout is not None
    shown = []
    for line in job.stdout:
        shown.append(line)
        if line.startswith(beginning):
            return
    raise AssertionError("".join(shown))


def ranks_of(job: subprocess.Popen[str]) -> dict[int, int]:
    """The process of each MPI rank of a job."""
    parents, rank_of = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found = re.search(
                    r"(?:^|\0)PMI_RANK=(\d+)\0", (entry / "environ").read_text(errors="replace")
                )
                if found:
                    rank_of[int(entry.name)] = int(found[1])

    def is_of_job(pid: int) -> bool:
        while pid > 1 and pid != job.pid:
            pid = parents.get(pid, 0)
        return pid == job.pid

    # A rank's own children have its variables too; it is the one whose parent has none.
    return {rank: pid for pid, rank in rank_of.items() if is_of_job(pid) and parents[pid] not in rank_of}


def _command(arguments: list[str], ranks: int) -> list[str]:
    command = [sys.executable, *arguments]
    return [mpirun(), "-n", str(ranks), *command] if ranks > 1 else command


def _environ() -> dict[str, str]:
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def results_of(
    module: str, *arguments: str, ranks: int, timeout_seconds: float = LIMIT_SECONDS
) -> dict[str, Any]:
    """What a module of checks printed as JSON after the word RESULTS."""
    finished = run(["-m", module, *arguments], ranks=ranks, timeout_seconds=timeout_seconds)
    lines = [line for line in finished.stdout.splitlines() if line.startswith("RESULTS ")]
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(lines) == 1, finished.stdout + finished.stderr
    results: dict[str, Any] = json.loads(lines[0].removeprefix("RESULTS "))
    return results


def launches(*, quick: int, full: Sequence[int]) -> list[Any]:
    """Parameters of a fixture whose ranks run a module's checks: choices, each with a number of ranks."""
    if os.environ.get("D2FT_WHOLE_MATRIX"):
        return [pytest.param(("matrix", ranks), id=f"matrix, {ranks} ranks") for ranks in (2, 4)]
    return [
        pytest.param(("quick", quick), id=f"quick, {quick} ranks"),
        *(pytest.param(("full", n), id=f"full, {n} ranks", marks=pytest.mark.full) for n in full),
    ]


HOURS = 4
"""For all checks together; each check has a limit of its own."""


def results_of_checks(module: ModuleType, choice: Choice, ranks: int) -> dict[str, Any]:
    """What all checks of a module found that belong to the choice."""
    if choice == "quick":
        results = quick_results(ranks)[module.__name__]
    else:
        results = results_of(module.__name__, choice, ranks=ranks, timeout_seconds=HOURS * 3600)
    assert set(results) == set(module.checks(ranks, choice))
    return results


@cache
def quick_results(ranks: int) -> dict[str, dict[str, Any]]:
    """What the quick checks of all modules found whose tests were collected, by module: the same ranks run them, since
    importing what engines need takes longer than most checks."""
    pairs = {
        "test_engines": "engine_checks",
        "test_torch_engines": "torch_checks",
        "test_parallel": "parallel_checks",
    }
    beside = __name__.rpartition(".")[0]
    modules = [f"{beside}.{checks}" for tests, checks in pairs.items() if f"{beside}.{tests}" in sys.modules]
    found = results_of(f"{beside}.quick_checks", *modules, ranks=ranks, timeout_seconds=HOURS * 3600)
    by_module: dict[str, dict[str, Any]] = {module: {} for module in modules}
    for name, result in found.items():
        module, check = name.split(" ", 1)
        by_module[module][check] = result
    return by_module
