"""Runs with the engines ddp and fsdp2, as users start them."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import d2ft_hpc.demo.model  # noqa: F401
from d2ft_hpc import results
from tests.distributed.launching import mpirun, run_command

pytest.importorskip("peft")
pytestmark = pytest.mark.full
MPIRUN = [mpirun(), "-n", "2", sys.executable]
TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node=2", "--standalone"]
QUICK = ["-m", "d2ft_hpc", "train", "configs/demo.yaml", "train.epochs=1", "train.steps_share=0.25"]
RUNS = {
    "ddp": [*TORCHRUN, *QUICK, "engine.name=ddp", "model.lora={rank: 2}"],
    "fsdp2": [*MPIRUN, *QUICK, "engine.name=fsdp2", "model.lora={rank: 2}"],
}


def start(command: list[str], folder: Path) -> None:
    finished = run_command([*command, f"run.folder={folder}"])
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_lora_by_both_engines_is_the_same_run_and_resumes_under_the_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        list(
            pool.map(
                lambda name: start([*RUNS[name], "train.checkpoint_every=1 steps"], tmp_path / name), RUNS
            )
        )
    for name in RUNS:
        steps = results.open_run(tmp_path / name / "demo").table("steps")
        np.testing.assert_allclose(
            steps["bytes_sent"][:-1], steps["planned_bytes"][:-1], rtol=0.02, err_msg=name
        )
        assert (steps["planned_bytes"] <= steps["dense_bytes"]).all()
    losses = {name: results.open_run(tmp_path / name / "demo").table("steps")["loss"] for name in RUNS}
    np.testing.assert_allclose(losses["ddp"], losses["fsdp2"], rtol=1e-5)
    models = {name: load_file(tmp_path / name / "demo" / "model.safetensors") for name in RUNS}
    assert (tmp_path / "fsdp2" / "demo" / "adapter" / "adapter_config.json").exists()
    (tmp_path / "ddp" / "demo" / "model.safetensors").unlink()  # with which it would be finished
    shutil.rmtree(max((tmp_path / "ddp" / "demo" / "checkpoints").glob("step-*")))
    start([*RUNS["fsdp2"], "train.checkpoint_every=1 steps", "train.resume=true"], tmp_path / "ddp")
    resumed = load_file(tmp_path / "ddp" / "demo" / "model.safetensors")
    for other in (models["fsdp2"], resumed):
        for name, weight in models["ddp"].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5, msg=name)
