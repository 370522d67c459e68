from __future__ import annotations

import os
import subprocess
import sys

import pytest

from d2ft_hpc.errors import LaunchError
from d2ft_hpc.launch.control import describe_ranks
from d2ft_hpc.launch.environment import LAUNCHERS, LaunchEnvironment, detect

TORCH = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
TORCHRUN = {**TORCH, "TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = {**TORCH, "CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "4"}
BATCH_SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = {**BATCH_SHELL, "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "2"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "3",
    "PMIX_RANK": "1",
}
INTERACTIVE_STEP = {"SLURM_STEP_ID": str(2**32 - 6)}
SINGLE = LaunchEnvironment("single process", 0, 0, 1, False)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, SINGLE),
        (BATCH_SHELL, SINGLE),
        ({**BATCH_SHELL, **INTERACTIVE_STEP}, SINGLE),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, SINGLE),
        ({"PMI_RANK": ""}, SINGLE),
        (TORCH, LaunchEnvironment("torch.distributed variables", 3, 1, 4, False)),
        (TORCHRUN, LaunchEnvironment("torchrun", 3, 1, 4, False)),
        (DEEPSPEED, LaunchEnvironment("deepspeed", 3, 1, 4, False)),
        ({**SRUN, **TORCHRUN}, LaunchEnvironment("torchrun", 3, 1, 4, False)),
        ({**HYDRA, **TORCHRUN}, LaunchEnvironment("torchrun", 3, 1, 4, False)),
        (HYDRA, LaunchEnvironment("MPICH", 1, 1, 2, True)),
        ({**BATCH_SHELL, **HYDRA}, LaunchEnvironment("MPICH", 1, 1, 2, True)),
        ({**SRUN, **HYDRA}, LaunchEnvironment("MPICH", 1, 1, 2, True)),
        ({**SRUN, **OPEN_MPI}, LaunchEnvironment("Open MPI", 1, 0, 3, True)),
        (SRUN, LaunchEnvironment("srun", 5, 2, 8, True)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "6"}, LaunchEnvironment("srun", 5, 2, 6, True)),
        ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8"}, LaunchEnvironment("MPICH", 5, 2, 8, True)),
        ({**SRUN, "PMIX_RANK": "5"}, LaunchEnvironment("PMIx", 5, 2, 8, True)),
        ({**SRUN, "WORLD_SIZE": "8", "MASTER_ADDR": "a"}, LaunchEnvironment("srun", 5, 2, 8, True)),
    ],
)
def test_detect(environ: dict[str, str], expected: LaunchEnvironment) -> None:
    assert detect(environ) == expected


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({"RANK": "0"}, ["LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"]),
        ({"WORLD_SIZE": "2"}, ["missing RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"]),
        ({**BATCH_SHELL, "LOCAL_RANK": "2"}, ["missing RANK, WORLD_SIZE"]),
        ({**TORCHRUN, "MASTER_PORT": ""}, ["torchrun", "missing MASTER_PORT."]),
        ({"PMI_RANK": "0"}, ["MPI_LOCALRANKID or PMI_LOCAL_RANK or SLURM_LOCALID, PMI_SIZE"]),
        ({**TORCH, "RANK": "two"}, ["RANK='two'", "whole number"]),
        ({**TORCH, "RANK": "4"}, ["rank 4", "of 4"]),
        ({**TORCH, "WORLD_SIZE": "-1"}, ["rank 3", "of -1"]),
        ({**TORCH, "RANK": "1_0"}, ["RANK='1_0'", "whole number"]),
        ({**TORCH, "RANK": "9" * 5000}, ["RANK='999", "whole number"]),
        ({**TORCH, "MASTER_PORT": "abc"}, ["MASTER_PORT='abc'", "whole number", "unset it"]),
        ({"MASTER_PORT": "70000"}, ["MASTER_PORT=70000", "1 to 65535", "unset it"]),
        ({**HYDRA, "MASTER_PORT": "-5"}, ["MASTER_PORT=-5"]),
        ({**SRUN, "SLURM_PROCID": "\x1b[31m"}, ["SLURM_PROCID='\\x1b[31m'", "whole number"]),
        ({**SRUN, "SLURM_STEP_ID": "a"}, ["SLURM_STEP_ID='a'", "whole number"]),
        ({**SRUN, "SLURM_NTASKS": "2(x3)"}, ["SLURM_NTASKS='2(x3)'", "whole number"]),
        ({**SRUN, "WORLD_SIZE": "abc"}, ["WORLD_SIZE='abc'", "whole number"]),
        ({**SRUN, "WORLD_SIZE": "16"}, ["WORLD_SIZE=16", "srun started 8"]),
        ({"HF_ENDPOINT": "https://me:SECRET/w@hub"}, ["variable HF_ENDPOINT is no address", "%2F"]),
        ({**HYDRA, "https_proxy": "http://me:SECRET/w@proxy"}, ["variable https_proxy is no address"]),
    ],
)
def test_contradictions_are_named(environ: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(LaunchError) as caught:
        detect(environ)
    for part in parts:
        assert part in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_every_launcher_is_one_row() -> None:
    """Each row alone, with every variable that it asks for, is detected by its name."""
    for name, row in LAUNCHERS.items():
        environ = {row.marker: "0", row.local_rank[0]: "0", row.world_size[0]: "1", row.rank[0]: "0"}
        environ |= dict.fromkeys(row.also_needs, "1")
        assert detect(environ) == LaunchEnvironment(name, 0, 0, 1, row.uses_mpi)


@pytest.mark.parametrize(
    ("ranks", "hosts", "text"),
    [
        ([0], ["a"], "rank 0 on a"),
        ([1, 0], ["a", "b"], "all ranks"),
        ([3, 1], ["a"] * 5, "ranks 1, 3 on a"),
        ([0, 1, 2, 4, 6], ["a"] * 4 + ["b"] * 4, "ranks 0-2 on a, ranks 4, 6 on b"),
    ],
)
def test_describe_ranks(ranks: list[int], hosts: list[str], text: str) -> None:
    assert describe_ranks(ranks, hosts) == text


def test_import_brings_neither_mpi_nor_torch() -> None:
    program = (
        "import sys, d2ft_hpc.launch; assert not {'mpi4py', 'torch'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("command", ["train", "score scores.h5", "doctor"])
def test_mpi_starts_before_anything_large_is_loaded(command: str) -> None:
    """Under Slurm's pmi2, MPICH's start fails at times in programs that have loaded much."""
    program = (
        "import sys\n"
        "from d2ft_hpc.cli import main\n"
        "from d2ft_hpc.launch import connect\n"
        "def start_mpi(*_, **__):\n"
        '    sys.exit(f\'loaded: {sorted({"torch", "timm", "deepspeed", "scipy"} & set(sys.modules))}\')\n'
        "sys.modules[connect.__module__].MpiControl = start_mpi\n"
        "main(sys.argv[1:])\n"
    )
    place = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}
    told = {name for row in LAUNCHERS.values() for name in (*row.rank, *row.local_rank, *row.world_size)}
    told |= {
        row.marker for row in LAUNCHERS.values()
    }  # DeepSpeed sets some in a process that other tests share
    started = subprocess.run(
        [sys.executable, "-c", program, *command.split(), "configs/demo.yaml"],
        env={**{name: value for name, value in os.environ.items() if name not in told}, **place},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "loaded: []" in started.stderr, started.stderr
