"""A loop of one's own under `attach`, and `d2ft-hpc train`, on the same images under the same plans."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from d2ft_hpc import results
from d2ft_hpc.planning import SkipPlan
from tests.distributed.launching import at_once, run_command

pytestmark = pytest.mark.full

TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node=2", "--standalone"]
LAUNCHERS = {"plain-1": [sys.executable], "ddp-2": TORCHRUN}
SCRIPT = str(Path(__file__).with_name("loop_like_train.py"))
TRAIN = [
    "-m", "d2ft_hpc", "train", "configs/demo.yaml", "model.weights=null", "train.epochs=1", "optimizer.warmup_share=0",
]  # fmt: skip


def start(command: list[str]) -> None:
    job = run_command(command)
    assert job.returncode == 0, job.stdout + job.stderr


def trained(planner: str, name: str, folder: Path) -> None:
    """Both in `folder`: the run in NAME, the loop in own-NAME."""
    engine, ranks = name.split("-")
    settings = [
        f"engine.name={engine}",
        f"plan.planner={planner}",
        f"run.folder={folder}",
        f"run.name={name}",
    ]
    start([*LAUNCHERS[name], *TRAIN, *settings])
    plan_file = []
    if planner == "static":  # whose scores a loop of one's own has after its first batch only
        with results.open(folder / name) as run:
            plan_file = [str(folder / f"{name}.h5")]
            SkipPlan(run.plan(0), int(ranks)).write(Path(plan_file[0]))
    start([*LAUNCHERS[name], SCRIPT, str(folder / f"own-{name}"), planner, *plan_file])


def test_the_losses_are_those_of_train(tmp_path: Path) -> None:
    cases = {"plain-1": "tokens", "ddp-2": "static"}
    at_once(*[partial(trained, planner, name, tmp_path) for name, planner in cases.items()])
    for name in cases:
        train, own = (results.open_run(tmp_path / folder).table("steps") for folder in (name, f"own-{name}"))
        assert train["loss"].shape == ({"plain-1": 18, "ddp-2": 9}[name],)
        np.testing.assert_allclose(own["loss"], train["loss"], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(own["gradient_norm"], train["gradient_norm"], rtol=1e-4, err_msg=name)
        same = ["planned_flops", "dense_flops", "rank_samples", "learning_rate"]
        same += ["planned_bytes", "dense_bytes"] if name == "ddp-2" else []  # one process sends nothing
        for column in same:
            np.testing.assert_allclose(own[column], train[column], rtol=1e-12, err_msg=f"{name} {column}")
        assert (own["memory_bytes"] > 2**20).all()
        assert 0.5 < train["planned_flops"].sum() / train["dense_flops"].sum() <= 0.6
