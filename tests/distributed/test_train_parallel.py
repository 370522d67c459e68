"""Runs whose ranks hold a part of the model each, as users start them."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import timm
from safetensors.torch import load_file

import d2ft_hpc.demo.model  # noqa: F401
from d2ft_hpc import results
from tests.distributed.launching import run

pytestmark = pytest.mark.full

QUICK = [
    "configs/demo.yaml",
    "data.micro_batch_size=16",
    "data.slots=4",
    "plan.planner=makespan",
    "plan.replan.every=4 steps",
    "train.epochs=1",
]
PIPELINE = ["engine.pipeline_stages=2", "engine.activation_checkpointing=true"]
TENSOR = ['engine.deepspeed={"tensor_parallel":{"autotp_size":2}}', "engine.head_placement=spread"]
SHARDED = [*TENSOR, "engine.token_layout=sharded"]


def train(folder: Path, *overrides: str, ranks: int) -> str:
    arguments = ["-m", "d2ft_hpc", "train", *QUICK, f"run.folder={folder}", *overrides]
    finished = run(arguments, ranks=ranks)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.parametrize(("layout", "ranks"), [([], 2), (PIPELINE[:1], 4)], ids=["replicas", "pipelines"])
def test_bytes_of_bf16_without_zero_are_as_told(tmp_path: Path, layout: list[str], ranks: int) -> None:
    train(tmp_path, *layout, "engine.name=deepspeed", "engine.precision=bf16", ranks=ranks)
    steps = results.open_run(tmp_path / "demo").table("steps")
    np.testing.assert_allclose(steps["bytes_sent"], steps["planned_bytes"], rtol=0.02)


@pytest.mark.parametrize("layout", [PIPELINE, SHARDED], ids=["pipeline", "tensor"])
def test_train_resume_and_export(tmp_path: Path, layout: list[str]) -> None:
    shown = train(tmp_path, *layout, "train.checkpoint_every=6 steps", ranks=2)
    if layout is PIPELINE:
        assert "pipeline stages (share of the dense FLOPs): blocks 0-2 50." in shown
    folder = tmp_path / "demo"
    steps = results.open_run(folder).table("steps")
    np.testing.assert_allclose(steps["bytes_sent"], steps["planned_bytes"], rtol=0.02)
    assert (steps["planned_bytes"] <= steps["dense_bytes"]).all()
    if layout is SHARDED:
        assert "tokens sharded" in shown
        assert steps["planned_bytes"].sum() < steps["dense_bytes"].sum()
        np.testing.assert_allclose(steps["executed_flops"], steps["planned_flops"], rtol=1e-3)
    else:  # what is recomputed is on top of the plan
        assert (steps["executed_flops"] > 1.05 * steps["planned_flops"]).all()
    assert steps["samples"].sum() == 716
    assert results.open_run(folder).attributes("environment")["replicas"] == 1
    weights = load_file(folder / "model.safetensors")
    timm.create_model("vit_digits_demo", num_classes=5).load_state_dict(weights, strict=True)
    accuracy = results.open_run(folder).table("evaluations")["accuracy"]
    assert accuracy[-1] > accuracy[0] + 0.2

    resumed = tmp_path / "resumed"
    shutil.copytree(folder, resumed / "demo")
    (resumed / "demo" / "model.safetensors").unlink()  # with which it would be finished
    for later in sorted((resumed / "demo" / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(later)
    train(resumed, *layout, "train.resume=true", ranks=2)
    with h5py.File(folder / "results.h5") as one, h5py.File(resumed / "demo" / "results.h5") as other:
        np.testing.assert_array_equal(one["steps"]["loss"], other["steps"]["loss"])
    again = load_file(resumed / "demo" / "model.safetensors")
    assert all(bool((weights[name] == again[name]).all()) for name in weights)


def test_an_export_goes_on_in_another_layout(tmp_path: Path) -> None:
    """Four ranks of two stages by two tensor ranks, which score samples together and draw the same; then the file they
    saved, in one process."""
    cut = [*TENSOR, "engine.pipeline_stages=2", "plan.planner=samples"]
    train(tmp_path, *cut, "train.epochs=1", ranks=4)
    before = results.open_run(tmp_path / "demo").table("evaluations")
    steps = results.open_run(tmp_path / "demo").table("steps")
    np.testing.assert_allclose(steps["executed_flops"], steps["planned_flops"], rtol=1e-3)
    assert steps["executed_flops"].sum() <= 0.61 * steps["dense_flops"].sum()
    assert (steps["rank_loss"] == steps["rank_loss"][:, :1]).all()
    train(
        tmp_path,
        "run.name=continued",
        f"model.weights={tmp_path}/demo/model.safetensors",
        "train.epochs=1",
        "plan.planner=dense",
        ranks=1,
    )
    after = results.open_run(tmp_path / "continued").table("evaluations")
    assert after["loss"][0] == pytest.approx(before["loss"][-1], rel=1e-6)
