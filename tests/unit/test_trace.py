"""Traces of chosen steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from d2ft_hpc.config import TrainConfig
from d2ft_hpc.training.trace import StepTrace


def run_steps(trace: StepTrace, count: int) -> None:
    for number in range(1, count + 1):
        with trace.step(number), torch.profiler.record_function(f"step {number}"):
            torch.ones(4).sum()
    trace.close()


@pytest.mark.parametrize(("steps", "traced"), [("2-3", {2, 3}), ("4", {4}), ("3-9", {3, 4, 5}), ("7", set())])
def test_the_chosen_steps_that_a_run_has_are_in_the_trace(
    steps: str, traced: set[int], tmp_path: Path
) -> None:
    path = tmp_path / "traces" / "rank-0.json"
    run_steps(StepTrace(TrainConfig(epochs=1, trace_steps=steps).traced, path), 5)
    if not traced:
        assert not path.exists()
        return
    events = json.loads(path.read_text())["traceEvents"]
    assert {event["name"] for event in events if event["name"].startswith("step ")} == {
        f"step {number}" for number in traced
    }


def test_a_trace_that_cannot_be_written_ends_no_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    run_steps(StepTrace(range(1, 2), tmp_path / "file" / "rank-0.json"), 2)
    assert "the trace cannot be written" in capfd.readouterr().err


@pytest.mark.parametrize("steps", ["0", "5-4", "all", "1-", "-3", ""])
def test_what_names_no_steps_is_refused(steps: str) -> None:
    with pytest.raises(ValidationError, match="write one step or the first and the last"):
        TrainConfig(epochs=1, trace_steps=steps)
