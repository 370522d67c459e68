"""Plans that are solved while training goes on, with measured costs and ranks of unequal speed, in a real job."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from d2ft_hpc import results
from d2ft_hpc.metering.profile import PassProfile
from tests.distributed.launching import run

pytestmark = pytest.mark.full


def train(overrides: dict[str, object], cache: Path) -> None:
    settings = [f"{key}={value}" for key, value in overrides.items()]
    finished = run(
        ["-m", "d2ft_hpc", "train", "configs/demo.yaml", *settings],
        ranks=2,
        D2FT_HPC_CACHE=str(cache),
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_training_goes_on_while_the_next_plan_is_solved(tmp_path: Path) -> None:
    overrides = {
        "data.micro_batch_size": 8,
        "data.slots": 4,
        "plan.planner": "joint",
        "plan.costs": "measured",
        "plan.device_speed": "[1.0,0.5]",
        "plan.replan.every": "4 steps",
        "plan.replan.overlap": "true",
        "train.epochs": 1,
        "train.checkpoint_every": "1 epoch",
        "run.folder": tmp_path,
    }
    train(overrides, tmp_path / "cache")
    opened = results.open_run(tmp_path / "demo")
    plans = opened.table("plans")
    first_steps = plans["step"].tolist()
    steps = opened.table("steps")
    assert len(first_steps) >= 2
    assert first_steps[0] == 0
    assert all(step >= 4 for step in first_steps[1:])
    assert np.isfinite(steps["loss"]).all()
    # Every step ran under the newest plan of its time, and every order to replan is told.
    assert steps["plan"].tolist() == [
        sum(first <= step for first in first_steps) - 1 for step in steps["step"]
    ]
    events = opened.table("events")
    told = [text for kind, text in zip(events["kind"], events["text"], strict=True) if kind == "replan"]
    assert len(told) == (len(steps["step"]) - 1) // 4
    assert sum(text.startswith("scores measured") for text in told) == len(first_steps) - 1

    # The costs are of this machine's own clock, and are in the run's records.
    costs = json.loads((tmp_path / "demo" / "costs.json").read_text())
    assert json.loads(opened.attributes("model")["plan_costs"]) == costs
    assert opened.attributes("model")["all_reduce_seconds"] > 0
    (measured,) = (tmp_path / "cache").glob("profile-*.json")
    passes = PassProfile(**json.loads(measured.read_text()))
    assert min(passes.always_seconds, passes.forward_only_seconds, passes.dense_seconds) > 0
    # The costs are the median of both ranks' profiles, the folder keeps one of them.
    assert costs["forward_share"] == pytest.approx(passes.forward_share, rel=0.5)
    assert costs["source"] == "measured"
    assert costs["device_speed"] == [1.0, 0.5]
    # The slower rank got half as much.
    for operations in plans["operations"]:
        work = np.array(
            [
                (costs["forward_share"] * (o == 1) + (o == 2)).sum()
                for o in (operations[::2], operations[1::2])
            ]
        )
        always = costs["always_share"] / (1 - costs["always_share"]) * operations[::2].size
        assert (work[1] + always) / (work[0] + always) == pytest.approx(0.5, rel=0.02)

    # A resumed run plans with the same costs, though the machine seems another by now.
    measured.unlink()
    train(overrides | {"train.epochs": 2, "train.resume": "true"}, tmp_path / "cache")
    assert json.loads((tmp_path / "demo" / "costs.json").read_text()) == costs
    assert len(list((tmp_path / "cache").glob("profile-*.json"))) == 1
