"""`results.h5` of a loop of one's own: what it holds, after a kill and a resume too."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from d2ft_hpc import results
from d2ft_hpc.errors import ConfigError, ResultsError
from d2ft_hpc.report import report
from d2ft_hpc.results import ResultsWriter
from tests.models import random_batch
from tests.unit.test_planned_loop import SLOTS, Loop


@pytest.mark.parametrize("recomputes", [True, False])
def test_a_loop_s_record_says_that_activations_were_recomputed(tmp_path: Path, recomputes: bool) -> None:
    loop = Loop(results=str(tmp_path / "mine"), planner="random", seed=1)
    loop.model.set_grad_checkpointing(recomputes)
    for step in range(3):
        loop.step(step)
    loop.d2ft.record.close()
    with results.open(tmp_path / "mine") as run:
        assert [*run.table("events")["kind"]].count("recompute") == recomputes
    assert ("\nmine: measured compute has the activations" in report([tmp_path / "mine"])) is recomputes


@pytest.mark.parametrize(
    "settings",
    [
        {"planner": "joint"},
        {"planner": "samples", "compute_budget": 0.7},
        pytest.param({"planner": "random", "seed": 1}, marks=pytest.mark.full),
    ],
)
def test_a_loop_s_record_has_its_steps_plans_and_promises(tmp_path: Path, settings: dict[str, Any]) -> None:
    loop = Loop(results=str(tmp_path / "mine"), **settings)
    losses = [loop.step(step) for step in range(3)]
    loop.model.eval()
    with torch.no_grad():
        loop.model(torch.zeros(1, 3, 16, 16))
    loop.d2ft.record.evaluation(0.25, 1.5, samples=8)
    with pytest.raises(
        ConfigError, match=r"accuracy=25 is not between 0 and 1; write it as a share, 0\.25 for"
    ):
        loop.d2ft.record.evaluation(25)
    loop.model.train()
    losses.append(loop.step(3, slots=SLOTS - 1))
    promised = loop.d2ft.promised_share
    loop.d2ft.record.close()
    with results.open(tmp_path / "mine") as run:
        assert run.complete
        steps, plans = run.table("steps"), run.table("plans")
        np.testing.assert_allclose(steps["loss"], losses, rtol=1e-6)
        np.testing.assert_allclose(steps["learning_rate"], 1e-3)
        first = -1 if settings["planner"] == "joint" else 0  # dense, to measure scores
        assert steps["plan"].tolist() == [first, 0, 0, 0]
        assert steps["rank_samples"][:, 0].tolist() == [36, 36, 36, 24]
        np.testing.assert_allclose(steps["executed_flops"], steps["planned_flops"], rtol=1e-9)
        share = steps["planned_flops"] / steps["dense_flops"]
        assert share[0, 0] == pytest.approx(1.0 if first else promised, abs=0.02)
        assert share[1, 0] == pytest.approx(promised, abs=0.02)  # samples are whole ones
        assert plans["hash"].tolist() == [loop.d2ft.plan.hash] if loop.d2ft.plan else False
        assert plans["step"].tolist() == [1 if first else 0]
        # A weight's gradient, which a dense batch computes as a third of its products, is computed once more.
        scored = run.table("scores")["flops"] / steps["dense_flops"][0]
        assert scored.tolist() == pytest.approx([0.3] if first else [], abs=0.04)
        assert run.table("evaluations")["accuracy"].tolist() == [0.25]
        assert (steps["step_seconds"] > 0).all()
        assert (steps["data_seconds"][[0, 3]] == 0).all()  # begins; after an evaluation, which is no data
        assert run.config["planner"] == settings["planner"]
    table = report([tmp_path / "mine"], page=tmp_path / "report.html")
    (row,) = (line for line in table.splitlines() if line.startswith("mine"))
    planned, measured = (float(cell) for cell in row.split()[2:4])
    dense = steps["dense_flops"].sum()
    assert planned == pytest.approx(100 * steps["planned_flops"].sum() / dense, abs=0.06)
    assert measured == pytest.approx(100 * steps["executed_flops"].sum() / dense, abs=0.06)
    assert "Promised and measured" in (tmp_path / "report.html").read_text()


def test_the_norm_of_the_gradient_is_that_of_all_that_the_optimiser_gets(tmp_path: Path) -> None:
    loop = Loop(
        planner="random", seed=1, results=str(tmp_path / "mine"), wrap=lambda model: nn.Sequential(model)
    )
    norms = []
    for step in range(3):
        images, labels = random_batch(step, samples=12)
        F.cross_entropy(loop.model(images), labels).backward()
        gradients = [p.grad for p in loop.model.parameters() if p.grad is not None]
        norms.append(torch.cat([each.flatten() for each in gradients]).double().norm().item())
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    loop.d2ft.record.close()
    with results.open(tmp_path / "mine") as run:
        np.testing.assert_allclose(run.table("steps")["gradient_norm"], norms, rtol=1e-5)
        assert (run.table("steps")["memory_bytes"] > 2**20).all()


def test_a_killed_loop_leaves_a_readable_file_that_its_resumption_continues(tmp_path: Path) -> None:
    settings = {"planner": "joint", "results": str(tmp_path / "mine")}
    loop = Loop(**settings)
    for step in range(3):
        if step == 2:
            state = {name: part.state_dict() for name, part in vars(loop).items()}
        loop.step(step)
    loop.d2ft.record._writer.flush()  # as its thread does; then the process is killed
    with results.open(tmp_path / "mine") as run:
        assert not run.complete
        assert run.table("steps")["step"].tolist() == [0, 1, 2]
    atexit.unregister(loop.d2ft.record.close)
    for writer in loop.d2ft.record._writers:
        writer._release()
    with pytest.raises(ResultsError, match="is not overwritten"):
        Loop(**settings).step(0)
    resumed = Loop(weights=1, **settings)
    for name, part in vars(resumed).items():
        part.load_state_dict(state[name])
    for step in (2, 3):
        resumed.step(step)
    resumed.d2ft.record.close()
    with results.open(tmp_path / "mine") as run:
        assert run.table("steps")["step"].tolist() == [0, 1, 2, 3]
        assert run.table("steps")["plan"].tolist() == [-1, 0, 0, 0]
        assert run.table("plans")["hash"].tolist() == [loop.d2ft.plan.hash]
        assert "resume" in run.table("events")["kind"]


def test_a_folder_where_nothing_can_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"results='.*mine': nothing can be written there.*another folder"):
        Loop(planner="joint", results=str(tmp_path / "file" / "mine"))


def test_a_cell_that_runs_again_closes_its_record_and_another_process_s_is_refused_at_attach(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "mine"
    settings = {"planner": "random", "seed": 1, "micro_batches": 1, "results": str(folder)}
    loop = Loop(**settings)
    loop.step(0, slots=1)
    again = Loop(**settings)
    with results.open(folder) as run:
        assert run.complete
        assert run.table("steps")["step"].tolist() == [0]
    with pytest.raises(ResultsError, match=r"exists and is not overwritten: resume that run, remove it"):
        again.step(0, slots=1)
    again.d2ft.load_state_dict(loop.d2ft.state_dict())
    again.step(1, slots=1)
    again.d2ft.record.close()
    with results.open(folder) as run:
        assert run.table("steps")["step"].tolist() == [0, 1]
    with (
        ResultsWriter(tmp_path / "other" / "results.h5"),
        pytest.raises(ResultsError, match=r"another process writes this run .* results= in a loop"),
    ):
        Loop(planner="joint", results=str(tmp_path / "other"))
