"""`d2ft-hpc train` with faults that users make: all ranks end, with one message and a non-zero status."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2ft_hpc import results
from d2ft_hpc.demo.model import DEMO_WEIGHTS
from d2ft_hpc.errors import ResultsError
from tests.distributed.launching import LIMIT_SECONDS, REPOSITORY, at_once, mpirun, run

QUICK = ["data.slots=1", "data.micro_batch_size=4", "train.epochs=1"]


def train(
    folder: Path, *overrides: str, ranks: int = 2, **environment: str
) -> subprocess.CompletedProcess[str]:
    arguments = ["-m", "d2ft_hpc", "train", "configs/demo.yaml", f"run.folder={folder}", *QUICK, *overrides]
    return run(arguments, ranks=ranks, **environment)


def assert_ended_with(finished: subprocess.CompletedProcess[str], *words: str) -> None:
    """One message of ours that has all the words, no traceback, a non-zero status."""
    messages = [
        line for line in finished.stderr.splitlines() if re.match(r"(d2ft-hpc: error:|\[rank \d)", line)
    ]
    assert finished.returncode != 0, finished.stderr
    assert len(messages) == 1, finished.stderr
    for word in words:
        assert word in messages[0], (word, messages[0])
    assert "Traceback" not in finished.stderr + finished.stdout, finished.stderr


def test_wrong_model(tmp_path: Path) -> None:
    """On two ranks, which agree on one message; faults below that are found like this one start one process each."""
    assert_ended_with(
        train(tmp_path, "model.name=vit_digit_demo", "model.weights=null"), "vit_digit_demo", "did you mean"
    )


@pytest.mark.full
def test_faults_of_model_and_data(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(DEMO_WEIGHTS.read_bytes()[:5000])
    (tmp_path / "file").write_text("not a folder")
    faults: dict[tuple[str, ...], tuple[str, ...]] = {
        ("model.name=resnet18", "model.weights=null", "engine.name=plain"): (
            "resnet18",
            "none of the supported models",
        ),
        ("data.name=cifar10", f"data.root={tmp_path}/absent", "data.classes=null"): (
            f"{tmp_path}/absent",
            "unpack",
        ),
        (f"model.weights={tmp_path}/cut.safetensors",): ("cut.safetensors", "safetensors file"),
        (f"run.folder={tmp_path}/file",): (str(tmp_path / "file"),),
    }
    jobs = [partial(train, tmp_path / "run", *overrides, ranks=1) for overrides in faults]
    ended = [*at_once(*jobs[:2]), *at_once(*jobs[2:])]
    for one, words in zip(ended, faults.values(), strict=True):
        assert_ended_with(one, *words)


def test_unknown_key(tmp_path: Path) -> None:
    assert_ended_with(
        train(tmp_path, "plan.compute_buget=0.5"), "plan.compute_buget", "0.5", "plan.compute_budget"
    )


def test_budget_of_zero(tmp_path: Path) -> None:
    assert_ended_with(train(tmp_path, "plan.compute_budget=0"), "plan.compute_budget=0", "greater than 0")


@pytest.mark.full
def test_impossible_budget(tmp_path: Path) -> None:
    assert_ended_with(train(tmp_path, "plan.compute_budget=0.0001"), "4 x 4 patches", "0.0001", "least")
    by_heads = train(tmp_path, "plan.compute_budget=0.0001", "plan.planner=joint")
    assert_ended_with(by_heads, "rank 0", "0.0001", "least")


@pytest.mark.full
def test_scores_that_are_not_numbers(tmp_path: Path) -> None:
    weights = {name: tensor.float() for name, tensor in load_file(DEMO_WEIGHTS).items()}
    weights["blocks.3.mlp.fc1.weight"][5, 7] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")
    assert_ended_with(train(tmp_path, f"model.weights={tmp_path}/nan.safetensors"), "score", "block", "nan")


@pytest.mark.full
def test_one_rank_fewer_than_promised(tmp_path: Path) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631"}
    ended = train(
        tmp_path, "launch.timeout_seconds=8", ranks=1, RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", **address
    )
    assert_ended_with(ended, "WORLD_SIZE=2", "rank 1")


@pytest.mark.full
def test_results_that_exist_already(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "results.h5").write_bytes(b"of an earlier run")
    assert_ended_with(train(tmp_path), "results.h5", "not overwritten", "another output folder")
    assert (tmp_path / "demo" / "results.h5").read_bytes() == b"of an earlier run"


@pytest.mark.full
def test_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here: needs root")
    try:
        assert_ended_with(train(disk, "train.steps_share=0.4"), "model.safetensors", "space")
    finally:
        # Lazily: the launcher's own processes may end a moment after it.
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def recorded_evaluations(folder: Path) -> int:
    try:
        with results.open(folder) as run:
            return len(run.table("evaluations")["accuracy"])
    except ResultsError:
        return 0


@pytest.mark.full
def test_killed_rank(tmp_path: Path) -> None:
    command = [mpirun(), "-n", "2", sys.executable, "-m", "d2ft_hpc", "train", "configs/demo.yaml"]
    job = subprocess.Popen(
        [*command, f"run.folder={tmp_path}", "train.epochs=200"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("epoch "):
            break
    deadline = time.monotonic() + LIMIT_SECONDS
    while not recorded_evaluations(tmp_path / "demo") and time.monotonic() < deadline:
        time.sleep(0.2)
    ranks = subprocess.run(
        ["pgrep", "-f", f"run.folder={tmp_path}"], capture_output=True, text=True
    ).stdout.split()
    pythons = [
        int(pid) for pid in ranks if "mpirun" not in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]
    ]
    pythons = [pid for pid in pythons if "python" in os.readlink(f"/proc/{pid}/exe")]
    os.kill(pythons[-1], signal.SIGKILL)
    rest, _ = job.communicate(timeout=LIMIT_SECONDS)
    assert job.returncode != 0
    assert re.search(r"signal:? 9", rest, re.IGNORECASE), rest
    assert not any(Path(f"/proc/{pid}").exists() for pid in pythons)
    assert recorded_evaluations(tmp_path / "demo") > 0


@pytest.mark.full
def test_corrupt_checkpoint(tmp_path: Path) -> None:
    finished = train(tmp_path, "train.checkpoint_every=1 epochs", "data.micro_batch_size=64")
    assert finished.returncode == 0, finished.stderr
    (state,) = (tmp_path / "demo" / "checkpoints").glob("step-*/optimizer.safetensors")
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    before = shutil.copy(tmp_path / "demo" / "results.h5", tmp_path / "before.h5")
    resumed = train(tmp_path, "train.epochs=2", "train.resume=true", "data.micro_batch_size=64")
    assert_ended_with(resumed, state.parent.name, "damaged")
    assert (tmp_path / "demo" / "results.h5").read_bytes() == Path(before).read_bytes()
