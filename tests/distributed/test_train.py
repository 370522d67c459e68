"""The main job as users start it, on real ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from functools import partial
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
from d2ft_hpc.training.checkpoint import verify
from tests.distributed.launching import LIMIT_SECONDS, at_once, free_port, ranks_of, run, start, wait_for_line

HOST = socket.gethostname()
DEPTH = 3  # of the model
STEPS = 6  # of an epoch
BUDGET = 0.42

QUICK = [
    "configs/demo.yaml",
    "data.micro_batch_size=8",
    "data.slots=4",
    "data.image_size=16",
    "data.train_fraction=0.5",
    "model.options.img_size=16",
    f"model.options.depth={DEPTH}",
    "model.weights=null",
    f"plan.compute_budget={BUDGET}",
    "plan.planner=paper",
]


def train(folder: Path, *overrides: str, ranks: int = 2, before: tuple[str, ...] = ("-m", "d2ft_hpc")) -> str:
    finished = run([*before, "train", *QUICK, f"run.folder={folder}", *overrides], ranks=ranks)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs on two ranks, replanned every epoch, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("runs")
    options = [
        "train.epochs=2",
        "train.checkpoint_every=4 steps",
        "plan.replan.every=1 epoch",
        "data.workers=1",
    ]
    shown = train(folder, *options)
    assert "evaluation after 2 epochs" in shown
    assert f"results in {folder / 'demo' / 'results.h5'}" in shown
    return folder / "demo"


def test_the_results_file_holds_the_whole_run(finished_run: Path) -> None:
    opened = results.open(finished_run)
    assert opened.complete
    assert opened.config["plan"]["compute_budget"] == BUDGET
    assert opened.attributes("environment")["world_size"] == 2
    steps = opened.table("steps")
    assert steps["step"].tolist() == list(range(2 * STEPS))
    assert np.isfinite(steps["loss"]).all()
    assert steps["step_seconds"].shape == (2 * STEPS, 2)
    assert steps["samples"].sum() == 2 * 358
    assert opened.table("evaluations")["epoch"].tolist() == [0, 1, 2]
    assert opened.table("evaluations")["confusion"].sum(axis=(1, 2)).tolist() == [180] * 3
    plans = opened.table("plans")
    assert plans["step"].tolist() == [0, STEPS]
    for index in (0, 1):
        assert opened.plan(index).shape == opened.score(index, "forward").shape == (8, DEPTH, 4)
        assert SkipPlan(opened.plan(index), replicas=2).hash == plans["hash"][index]
        assert plans["planned_compute"][index] <= BUDGET
        full, forward_only = ((opened.plan(index)[::2] == operation).sum(axis=2) for operation in (2, 1))
        micro_batches = np.concatenate([full, forward_only], axis=1)  # of replica 0
        assert plans["micro_batch_shapes"][index] == len(np.unique(micro_batches, axis=0))
        skipping = set(zip(full.flat, forward_only.flat, strict=True)) - {(4, 0), (0, 0)}
        assert plans["block_shapes"][index] >= len(skipping) > 0
    parameters = opened.datasets("model")
    assert (np.asarray(parameters["parameter_class"]) == "subnet").sum() == DEPTH * 6
    assert np.asarray(parameters["subnet_parameters"]).shape == (DEPTH, 4)


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
    assert steps["executed_flops"].sum() / steps["dense_flops"].sum() == pytest.approx(BUDGET, abs=0.005)


def test_the_model_loads_in_plain_timm(finished_run: Path) -> None:
    model = timm.create_model("vit_digits_demo", num_classes=5, img_size=16, depth=DEPTH)
    model.load_state_dict(load_file(finished_run / "model.safetensors"), strict=True)


def test_checkpoints_are_kept_as_asked_and_nothing_half_written_stays(finished_run: Path) -> None:
    kept = sorted(path.name for path in (finished_run / "checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000012"]
    for name in kept:
        verify(finished_run / "checkpoints" / name)


@pytest.mark.full
def test_another_number_of_ranks_continues_the_same_run_under_another_zero_stage(
    finished_run: Path, tmp_path: Path
) -> None:
    """One rank runs all rows of the batch that two ranks shared: the same sums in another order."""
    shutil.copytree(finished_run, tmp_path / "demo")
    (tmp_path / "demo" / "model.safetensors").unlink()  # with which it would be finished
    shutil.rmtree(tmp_path / "demo" / "checkpoints" / "step-00000012")
    zero = "engine.deepspeed.zero_optimization.stage=3"
    train(tmp_path, "train.epochs=2", "plan.replan.every=1 epoch", "train.resume=true", zero, ranks=1)
    whole, resumed = (results.open_run(path).table("steps") for path in (finished_run, tmp_path / "demo"))
    np.testing.assert_array_equal(resumed["samples"], whole["samples"])
    np.testing.assert_allclose(resumed["loss"], whole["loss"], rtol=1e-4)


@pytest.mark.parametrize("hangs_too", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_run_that_is_stopped_and_hung_ends_bitwise_as_the_uninterrupted_one(
    finished_run: Path, tmp_path: Path, hangs_too: bool
) -> None:
    options = ["train.epochs=2", "plan.replan.every=1 epoch", "train.resume=auto"]
    arguments = ["-m", "d2ft_hpc", "train", *QUICK, f"run.folder={tmp_path}", *options]

    stopped = start(arguments, ranks=2)
    wait_for_line(stopped, "epoch ")
    os.kill(ranks_of(stopped)[1], signal.SIGUSR2)
    assert f"by signal USR2 to rank 1 on {HOST}; saved" in stopped.communicate(timeout=LIMIT_SECONDS)[0]
    assert stopped.returncode == 75

    if hangs_too:
        more = ["train.checkpoint_every=2 steps", "launch.silence_seconds=15"]  # which a busy machine keeps
        hung = start([*arguments, *more], ranks=2)
        wait_for_line(hung, "epoch ")
        os.kill(ranks_of(hung)[1], signal.SIGSTOP)
        told = hung.communicate(timeout=LIMIT_SECONDS)[0]
        messages = [line for line in told.splitlines() if line.startswith("[rank ")]
        assert messages == [
            f"[rank 0 on {HOST}] error: rank 1 on {HOST} has been silent for 15 s: it is stopped or its node is down"
        ]
        assert "this rank was here" in (tmp_path / "demo" / "errors" / "rank-0.txt").read_text()
        assert hung.returncode not in (0, 1)

    train(tmp_path, *options)
    with (
        h5py.File(finished_run / "results.h5") as whole,
        h5py.File(tmp_path / "demo" / "results.h5") as resumed,
    ):
        for column in ("step", "loss", "learning_rate", "plan"):
            np.testing.assert_array_equal(resumed["steps"][column], whole["steps"][column])
        for column in ("accuracy", "loss"):
            np.testing.assert_array_equal(resumed["evaluations"][column], whole["evaluations"][column])
    one, other = (load_file(folder / "model.safetensors") for folder in (finished_run, tmp_path / "demo"))
    assert all(bool((one[name] == other[name]).all()) for name in one)
    launches = (tmp_path / "demo" / "launches.jsonl").read_text().splitlines()
    starts = [json.loads(line)["start"] for line in launches]
    assert starts[0] == "the beginning"
    assert all("checkpoints/step-" in place for place in starts[1:])
    assert len(starts) == 2 + hangs_too


@pytest.mark.full
def test_a_failing_rank_leaves_the_traceback_of_every_rank(tmp_path: Path) -> None:
    failed = run(["-m", "tests.distributed.failing_rank", "train", *QUICK, f"run.folder={tmp_path}"], ranks=2)
    assert failed.returncode != 0
    messages = [line for line in failed.stderr.splitlines() if line.startswith("[rank ")]
    trace = tmp_path / "demo" / "errors" / "rank-1.txt"
    assert messages == [f"[rank 1 on {HOST}] unexpected KeyError: 'a bug' (traceback in {trace})"]
    assert "KeyError: 'a bug'" in trace.read_text()
    waiting = (tmp_path / "demo" / "errors" / "rank-0.txt").read_text()
    assert "ended by: [rank 1 on" in waiting
    assert "training/loop.py" in waiting


@pytest.mark.full
def test_a_file_for_each_rank_survives_a_resumption(tmp_path: Path) -> None:
    options = [
        "plan.replan.every=4 steps",
        "train.epochs=1",
        "results.file_per_rank=true",
    ]
    train(tmp_path / "whole", *options, "train.checkpoint_every=2 steps")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (tmp_path / "resumed" / "demo" / "model.safetensors").unlink()
    shutil.rmtree(max((tmp_path / "resumed" / "demo" / "checkpoints").glob("step-*")))
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


@pytest.mark.full
def test_without_mpi(tmp_path: Path) -> None:
    """Alone, and under the deepspeed launcher; torchrun is in test_train_torch.py."""
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    starts: dict[str, tuple[str, ...]] = {
        "single process": ("-m", "d2ft_hpc"),
        "deepspeed": (deepspeed, "--num_gpus", "2", f"--master_port={free_port()}", "--module", "d2ft_hpc"),
    }
    short = ("train.epochs=1", "train.steps_share=0.5", "engine.device=cpu")
    at_once(
        *(
            partial(train, tmp_path / name, *short, f"engine.name={engine}", ranks=1, before=starts[name])
            for name, engine in zip(starts, ("plain", "deepspeed"), strict=True)
        )
    )
    for name, ranks in zip(starts, (1, 2), strict=True):
        opened = results.open(tmp_path / name / "demo")
        environment = opened.attributes("environment")
        assert (environment["launcher"], environment["world_size"]) == (name, ranks)
        assert (opened.table("steps")["bytes_sent"].min() > 0) == (ranks > 1)
