"""Ranks started by the real launchers: they meet, agree, and end together."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from d2ft_hpc.errors import UNFINISHED
from tests.distributed.launching import LIMIT_SECONDS, free_port

PROGRAM = Path(__file__).with_name("launch_ranks.py")
BIN = Path(sys.executable).parent
HOST = socket.gethostname()
LAUNCHER_VARIABLE = re.compile(
    r"RANK$|WORLD_SIZE$|LOCAL_|MASTER_|CROSS_|PMI|OMPI|MPI_|SLURM_|TORCHELASTIC_|HYD"
)
pytestmark = pytest.mark.skipif(shutil.which("mpirun", path=BIN) is None, reason="needs the mpich wheel")


@dataclass
class Job:
    process: subprocess.Popen[str]

    def end(self) -> Job:
        try:
            self.out, self.err = self.process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.out, self.err = self.process.communicate()
            pytest.fail(f"hung: {self.out}\n{self.err}")
        self.status = self.process.returncode
        return self

    def messages(self) -> list[str]:
        """The lines that d2ft_hpc itself wrote to stderr."""
        return [line for line in self.err.splitlines() if line.startswith(("d2ft-hpc: ", "[rank "))]


def start(*command: str, stdout: int | IO[str] = subprocess.PIPE, **variables: str) -> Job:
    environ = {name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLE.search(name)}
    root = str(Path(__file__).parents[2])
    environ |= {
        "PATH": f"{BIN}:{environ['PATH']}",
        "PYTHONPATH": f"{root}:{environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "FATAL",  # gloo's own lines, which also begin with [rank
        **variables,
    }
    return Job(
        subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    )


def mpirun(ranks: int, *arguments: str, **variables: str) -> Job:
    return start("mpirun", "-n", str(ranks), sys.executable, str(PROGRAM), *arguments, **variables)


def torchrun(ranks: int, *arguments: str, **variables: str) -> Job:
    return start(
        "torchrun", "--standalone", f"--nproc_per_node={ranks}", str(PROGRAM), *arguments, **variables
    )


def by_hand(rank: int, world_size: int, port: int, *arguments: str, **more: str) -> Job:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    strings = {name: str(value) for name, value in variables.items()} | more
    return start(sys.executable, str(PROGRAM), *arguments, MASTER_ADDR="127.0.0.1", **strings)


def ports(job: Job, ranks: int, control: str) -> str:
    assert job.status == 0, f"{job.out}\n{job.err}"
    assert job.messages() == []
    found = re.findall(rf"rank (\d) ok, port (\d+), {control}", job.out)
    assert sorted(int(rank) for rank, _ in found) == list(range(ranks))
    (port,) = {port for _, port in found}
    return str(port)


@pytest.mark.full
def test_two_mpi_jobs_at_once_with_deepspeed_and_data_loader_workers() -> None:
    jobs = mpirun(2, "agreement deepspeed workers"), mpirun(4, "agreement")
    assert ports(jobs[0].end(), 2, "MpiControl") != ports(jobs[1].end(), 4, "MpiControl")


@pytest.mark.full
def test_launchers_without_mpi() -> None:
    port = free_port()
    deepspeed = ("deepspeed", "--num_gpus=2", f"--master_port={port}", "--no_local_rank")
    lazily = {"TORCH_GLOO_LAZY_INIT": "1"}  # as of many ranks
    jobs = torchrun(2, "agreement", **lazily), start(*deepspeed, str(PROGRAM), "agreement")
    ports(jobs[0].end(), 2, "GlooControl")
    assert ports(jobs[1].end(), 2, "GlooControl") == str(port)


def test_single_process_needs_no_mpi_and_reports_its_faults() -> None:
    good, wrong = (start(sys.executable, str(PROGRAM), scene) for scene in ("meet", "user error"))
    ports(good.end(), 1, "SoloControl")
    wrong.end()
    assert (wrong.status, wrong.messages()) == (1, ["d2ft-hpc: error: reading the data: no such folder"])


@pytest.mark.full
def test_agreed_fault_is_told_once_under_mpirun() -> None:
    job = mpirun(2, "user error").end()
    assert job.status == 1
    assert job.messages() == ["d2ft-hpc: error: reading the data: no such folder (all ranks)"]
    assert "Traceback" not in job.err


@pytest.mark.parametrize("launch", [mpirun, pytest.param(torchrun, marks=pytest.mark.full)])
def test_bug_on_one_rank_ends_all_and_leaves_its_traceback(launch: object, tmp_path: Path) -> None:
    job = launch(2, "bug", RUN_FOLDER=str(tmp_path)).end()  # type: ignore[operator]
    trace = tmp_path / "errors" / "rank-1.txt"
    assert job.status != 0
    assert job.messages() == [
        rf"[rank 1 on {HOST}] unexpected KeyError: 'a bug\nin two lines' (traceback in {trace})"
    ]
    assert "KeyError" in trace.read_text()
    assert [path.name for path in trace.parent.iterdir()] == [trace.name]


def test_fault_of_one_rank_killed_rank_and_late_rank_under_mpirun(tmp_path: Path) -> None:
    scenes = ("lonely error", "killed", "hang")
    jobs = [mpirun(2, scene, D2FT_FAILURE_FILE=str(tmp_path / scene)) for scene in scenes]
    lonely, killed, late = (job.end() for job in jobs)
    assert lonely.status != 0
    assert [path.name for path in tmp_path.iterdir()] == ["lonely error"]
    assert (tmp_path / "lonely error").read_text() == "the disk is full\n"
    assert lonely.messages() == [f"[rank 1 on {HOST}] error: the disk is full"]
    assert killed.status != 0
    assert "ok" not in killed.out
    assert late.status == UNFINISHED
    assert late.messages() == [
        f"[rank 0 on {HOST}] error: rank 1 on {HOST} did not come to a barrier within 2 s"
    ]


@pytest.mark.full
def test_killed_ranks_leave_no_shared_memory() -> None:
    """Of MPICH, whose own clean-up a kill does without; other jobs of this machine may have some."""
    before = set(Path("/dev/shm").glob("mpich_shm_*"))
    assert mpirun(2, "killed").end().status != 0
    left = set(Path("/dev/shm").glob("mpich_shm_*")) - before
    mapped = ""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            mapped += (process / "maps").read_text()
    assert [path for path in left if path.exists() and str(path) not in mapped] == []


@pytest.mark.full
def test_rank_stopped_while_torch_loads_leaves_the_job_unfinished(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.distributed.stopped_rank"]
    options = ["configs/demo.yaml", f"run.folder={tmp_path}", "launch.timeout_seconds=4"]
    failure = tmp_path / "failure"
    job = start("mpirun", "-n", "2", *program, "train", *options, D2FT_FAILURE_FILE=str(failure)).end()
    assert job.status == UNFINISHED
    assert job.messages() == [
        f"d2ft-hpc: error: [rank 0] rank 1 on {HOST} did not come to a barrier within 4 s"
    ]
    assert not failure.exists()


@pytest.mark.full
def test_interrupt_is_quiet() -> None:
    port = free_port()
    jobs = by_hand(1, 2, port, "interrupt"), by_hand(0, 2, port, "interrupt"), mpirun(2, "interrupt")
    gloo, _, mpi = (job.end() for job in jobs)
    for job in (gloo, mpi):
        assert (job.status, job.messages()) == (130, [])
        assert "KeyboardInterrupt" not in job.err
        assert "terminate" not in job.err


@pytest.mark.full
def test_killed_rank_without_a_launcher_is_noticed_by_the_other() -> None:
    port = free_port()
    jobs = [by_hand(rank, 2, port, "killed") for rank in range(2)]
    survivor = jobs[0].end()
    assert jobs[1].end().status == -signal.SIGKILL
    assert survivor.status == UNFINISHED
    assert survivor.messages() == [
        f"[rank 0 on {HOST}] error: lost the connection to rank 1 on {HOST}: it ended or cannot be reached"
    ]


@pytest.mark.full
def test_rank_that_never_comes() -> None:
    port = free_port()
    jobs = by_hand(0, 2, port, "meet", "2"), by_hand(1, 2, free_port(), "meet", "2"), mpirun(2, "absent", "2")
    stranger = by_hand(1, 2, port, "meet", "2", D2FT_SECRET="another one")
    alone, lost, mpi = (job.end() for job in jobs)
    assert stranger.end().status == 1
    assert "did not reach rank 0" in stranger.messages()[0]
    assert alone.status == 1
    (message,) = alone.messages()
    assert re.search(
        r"1 of the 2 ranks that WORLD_SIZE=2 promises did not come .* within 2 s: rank 1\.", message
    )
    assert lost.status == 1
    (message,) = lost.messages()
    assert re.search(r"\[rank 1\] .* did not reach rank 0 at 127\.0\.0\.1:\d+ within 2 s", message)
    assert mpi.status != 0
    (message,) = mpi.messages()
    assert message.startswith(f"[rank 0 on {HOST}] MPI_Init did not return within 2 s")


@pytest.mark.full
def test_two_jobs_at_one_port_are_named() -> None:
    port = free_port()
    jobs = [by_hand(0, 2, port, "meet", "3") for _ in range(2)]
    told = sorted(message for job in jobs for message in job.end().messages())
    assert [job.status for job in jobs] == [1, 1]
    assert re.search(r"1 of the 2 ranks .* did not come to 127\.0\.0\.1", told[0])
    assert re.search(
        rf"cannot serve the rendezvous at 127\.0\.0\.1:{port}: Address already in use \(another job", told[1]
    )


@pytest.mark.full
@pytest.mark.parametrize("launch", [mpirun, torchrun])
def test_ranks_survive_rubbish_at_all_that_they_listen_on(launch: Callable[..., Job], tmp_path: Path) -> None:
    """From before their start to their end, by a process of the same user, which the kernel cannot tell from a rank."""
    mark = f"D2FT_ATTACKED={tmp_path}"
    with (tmp_path / "attacked").open("w") as log:
        attacker = start(sys.executable, "-m", "tests.distributed.attacker", mark, stdout=log)
    try:
        job = launch(2, "attacked", D2FT_ATTACKED=str(tmp_path), UCX_NET_DEVICES="lo")
        ports(job.end(), 2, "MpiControl" if launch is mpirun else "GlooControl")
    finally:
        attacker.process.kill()
        attacker.process.communicate()
    attacked = (tmp_path / "attacked").read_text().splitlines()
    assert any(line.startswith("unix @d2ft_hpc/") for line in attacked)
    assert (
        sum(line.startswith("tcp 127.0.0.1 ") for line in attacked) > 2 * 20
    )  # gloo's, of each rank and group
    listens = set(re.findall(r"rank \d listens: (.*)", job.out))
    wider = {line for line in listens if not line.startswith("tcp 127.0.0.1 ")}
    assert listens - wider
    assert len(wider) == (launch is mpirun)  # of mpirun itself, which its ranks inherit


def test_worlds_of_one_are_refused() -> None:
    slurm = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    jobs = [start(sys.executable, str(PROGRAM), "meet", SLURM_PROCID=str(r), **slurm) for r in range(2)]
    told, silent = (job.end() for job in jobs)
    assert (told.status, silent.status) == (1, 1)
    (message,) = told.messages()
    for part in ("srun promised 2 ranks (SLURM_NTASKS=2)", "MPICH", "a world of 1", "srun --mpi=pmi2"):
        assert part in message
    assert silent.messages() == []
