"""The main job as users start it, on real ranks."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import timm
from safetensors.torch import load_file

import d2ft_hpc.demo.model  # noqa: F401
from d2ft_hpc import results
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.results.schema import PHASES
from tests.distributed.launching import run

QUICK = [
    "configs/demo.yaml",
    "data.micro_batch_size=8",
    "data.slots=4",
    "plan.compute_budget=0.5",
    "plan.planner=paper",
]


def train(folder: Path, *overrides: str, ranks: int = 2, before: tuple[str, ...] = ("-m", "d2ft_hpc")) -> str:
    finished = run(
        [*before, "train", *QUICK, f"run.folder={folder}", *overrides], ranks=ranks, timeout_seconds=240
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs on two ranks, replanned every epoch, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["train.epochs=2", "train.checkpoint_every_epochs=1", "plan.replan.every=1", "data.workers=1"]
    shown = train(folder, *options)
    assert "evaluation after 2 epochs" in shown
    assert f"results in {folder / 'demo' / 'results.h5'}" in shown
    return folder / "demo"


def test_the_results_file_holds_the_whole_run(finished_run: Path) -> None:
    opened = results.open(finished_run)
    assert opened.complete
    assert opened.config["plan"]["compute_budget"] == 0.5
    assert opened.attributes("environment")["world_size"] == 2
    steps = opened.table("steps")
    assert steps["step"].tolist() == list(range(len(steps["step"])))
    assert np.isfinite(steps["loss"]).all()
    assert steps["step_seconds"].shape == (len(steps["step"]), 2)
    assert steps["samples"].sum() == 2 * 716
    assert opened.table("evaluations")["epoch"].tolist() == [0, 1, 2]
    assert opened.table("evaluations")["confusion"].sum(axis=(1, 2)).tolist() == [180] * 3
    plans = opened.table("plans")
    assert plans["step"].tolist() == [0, len(steps["step"]) // 2]
    for index in (0, 1):
        assert opened.plan(index).shape == opened.score(index, "forward").shape == (8, 6, 4)
        assert SkipPlan(opened.plan(index), replicas=2).hash == plans["hash"][index]
        assert plans["planned_compute"][index] <= 0.5
    parameters = opened.datasets("model")
    assert (np.asarray(parameters["parameter_class"]) == "subnet").sum() == 6 * 6
    assert np.asarray(parameters["subnet_parameters"]).shape == (6, 4)


def test_every_second_has_its_phase_and_every_byte_its_kind(finished_run: Path) -> None:
    steps = results.open(finished_run).table("steps")
    phases = sum(steps[f"{phase}_seconds"] for phase in PHASES)
    np.testing.assert_allclose(phases, steps["step_seconds"], rtol=1e-4)
    assert (steps["communication_seconds"] > 0).all()
    assert (steps["waiting_seconds"].min(axis=1) == 0).all()
    assert (steps["memory_bytes"] > 1e6).all()
    np.testing.assert_array_equal(steps["all_reduce_bytes"], steps["bytes_sent"])
    np.testing.assert_allclose(steps["rank_loss"].mean(axis=1), steps["loss"])


def test_executed_compute_is_what_the_plan_promised(finished_run: Path) -> None:
    steps = results.open(finished_run).table("steps")
    np.testing.assert_allclose(steps["executed_flops"], steps["planned_flops"], rtol=1e-3)
    assert 0.4 < steps["executed_flops"].sum() / steps["dense_flops"].sum() <= 0.5


def test_the_model_loads_in_plain_timm(finished_run: Path) -> None:
    model = timm.create_model("vit_digits_demo", num_classes=5)
    model.load_state_dict(load_file(finished_run / "model.safetensors"), strict=True)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "demo")
    shutil.rmtree(tmp_path / "demo" / "checkpoints" / "epoch-0002")
    train(tmp_path, "train.epochs=2", "plan.replan.every=1", "train.resume=true")
    with (
        h5py.File(finished_run / "results.h5") as whole,
        h5py.File(tmp_path / "demo" / "results.h5") as resumed,
    ):
        for column in ("step", "loss", "learning_rate", "plan"):
            np.testing.assert_array_equal(resumed["steps"][column], whole["steps"][column])
    one, other = (load_file(folder / "model.safetensors") for folder in (finished_run, tmp_path / "demo"))
    assert all(bool((one[name] == other[name]).all()) for name in one)


def test_a_file_for_each_rank_survives_a_resumption(tmp_path: Path) -> None:
    options = ["plan.replan.every=1", "train.epochs=2", "results.file_per_rank=true"]
    train(tmp_path / "whole", *options, "train.checkpoint_every_epochs=1")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "demo" / "checkpoints" / "epoch-0002")
    train(tmp_path / "resumed", *options, "train.resume=true")
    folders = [tmp_path / name / "demo" for name in ("whole", "resumed")]
    with results.open(folders[0]) as whole, results.open(folders[1]) as resumed:
        assert whole.rank_files == resumed.rank_files == 2
        assert whole.table("plans")["step"].tolist() == resumed.table("plans")["step"].tolist()
        one, other = whole.table("steps"), resumed.table("steps")
        for column in ("step", "loss", "samples", "executed_flops", "bytes_sent"):
            np.testing.assert_array_equal(other[column], one[column])
    with h5py.File(folders[1] / "results.h5") as alone:
        np.testing.assert_array_equal(alone["steps/executed_flops"][:], one["executed_flops"])


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_one_process_without_a_launcher(tmp_path: Path, engine: str) -> None:
    train(tmp_path, "train.epochs=1", f"engine.name={engine}", ranks=1)
    assert results.open(tmp_path / "demo").attributes("environment")["launcher"] == "single process"


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers_without_mpi(tmp_path: Path, launcher: str) -> None:
    if launcher == "torchrun":
        before = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "d2ft_hpc")
    else:
        command = str(Path(sys.executable).with_name("deepspeed"))
        before = (command, "--num_gpus", "2", "--master_port", "29644", "--module", "d2ft_hpc")
    train(tmp_path, "train.epochs=1", "engine.device=cpu", ranks=1, before=before)
    opened = results.open(tmp_path / "demo")
    assert opened.attributes("environment")["world_size"] == 2
    assert opened.table("steps")["bytes_sent"].min() > 0
