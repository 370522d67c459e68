"""What is measured and shown of a run while it goes on: phases, evaluation, progress, TensorBoard."""

from __future__ import annotations

import io
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, recall_score
from torch import nn

from d2ft_hpc import results
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.launch.control import SoloControl
from d2ft_hpc.metering import StepCosts, phases
from d2ft_hpc.metering.profile import PassProfile, profile_passes
from d2ft_hpc.recording.step_recorder import StepRecord, StepRecorder
from d2ft_hpc.training.evaluate import evaluate
from d2ft_hpc.training.progress import Progress
from d2ft_hpc.training.step_runner import _bytes_by_kind
from d2ft_hpc.training.tensorboard import TensorBoard
from tests.models import DEPTH, HEADS, tiny_vit

CPU = torch.device("cpu")


def test_phases_are_the_step_and_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(phases.time, "perf_counter", lambda: 2.0 ** next(ticks))
    with phases.timed_step(CPU) as times:  # marks at 1, then 2, 4, 8, ...
        with phases.phase("forward"):  # 2 to 4
            pass
        with phases.phase("backward"), phases.phase("communication"):  # 8 to 64, within 16 to 32
            pass
    assert times.ready
    assert times.seconds() == {"other": 1 + 4 + 64, "forward": 2, "backward": 8 + 32, "communication": 16}
    assert sum(times.seconds().values()) == 128 - 1
    with phases.phase("forward"):
        assert next(ticks) == 8  # outside of a step nothing is timed


def test_messages_count_as_communication(tmp_path: Path) -> None:
    from torch import distributed

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with phases.timed_step(CPU) as times, phases.phase("backward"):
            distributed.all_reduce(torch.ones(4))
            distributed.all_reduce(torch.ones(4), async_op=True).wait()
    finally:
        distributed.destroy_process_group()
    assert times.seconds()["communication"] > 0


def test_bytes_by_kind_know_the_operators_of_torch() -> None:
    metered = {
        "allreduce": 1, "allgather_base": 2, "reduce_scatter_base": 4, "broadcast": 8, "send": 16, "alltoall": 32,
    }  # fmt: skip
    assert _bytes_by_kind(metered) == {
        "all_reduce_bytes": 1,
        "all_gather_bytes": 2,
        "reduce_scatter_bytes": 4,
        "broadcast_bytes": 8,
        "point_to_point_bytes": 16,
        "other_bytes": 32,
    }


def test_evaluation_against_scikit_learn() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    batches = [
        (torch.randn(n, 3, 2, 2), torch.randint(0, 4, (n,))) for n in (7, 9, 1)
    ]  # no sample of class 4
    result = evaluate(model, batches, SoloControl(), CPU)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = model(images).detach()
    predicted = logits.argmax(-1)
    np.testing.assert_array_equal(result.confusion, confusion_matrix(labels, predicted, labels=range(5)))
    recall = recall_score(labels, predicted, labels=range(4), average=None, zero_division=0)
    np.testing.assert_allclose(result.class_accuracy[:4], recall)
    assert np.isnan(result.class_accuracy[4])
    assert result.accuracy == pytest.approx(float((predicted == labels).double().mean()))
    assert result.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))
    assert result.samples == 17


def test_a_profile_leaves_the_model_as_it_was() -> None:
    from d2ft_hpc.execution.attach import attach

    model = tiny_vit()
    executor = attach(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    profile = profile_passes(model, executor, (2, 3, 16, 16), torch.float32)
    assert profile.dense_seconds > profile.always_seconds > 0
    assert executor.plan is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_ideal_time_is_what_always_runs_and_a_share_of_the_rest() -> None:
    costs = StepCosts(
        outside_flops=100.0,
        full_by_block=np.full(DEPTH, 10.0),
        forward_only_by_block=np.full(DEPTH, 3.0),
        subnets=np.full(DEPTH, HEADS),
        trains=np.ones(DEPTH, bool),
    )
    profile = PassProfile(dense_seconds=5.0, always_seconds=1.0, forward_only_seconds=2.0)
    assert profile.ideal_seconds(1.0, costs) == pytest.approx(5.0)
    assert profile.ideal_seconds(costs.always_share, costs) == pytest.approx(1.0)
    assert profile.ideal_seconds((1 + costs.always_share) / 2, costs) == pytest.approx(3.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show_steps(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, ideal_seconds: float = 0.8) -> str:
    """Ten steps of 1 s, with an evaluation of 7 s after the fifth."""
    now = [0.0]
    monkeypatch.setattr("d2ft_hpc.training.progress.time.perf_counter", lambda: now[0])
    progress = Progress(0, 10, 40, stream=stream)
    for step in range(1, 11):
        now[0] += 1.0
        if progress.is_due(step, ideal_seconds):
            progress.step(1, step, 0.5, 1e-3, 0.6, waiting_for_data=0.3 if step == 10 else 0.0)
        if step == 5:
            now[0] += 7.0
            progress.evaluated(0.9, 7.0)
            progress.say("evaluation")
    return stream.getvalue()


def test_progress_in_a_log_file_is_sparse_and_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    first, evaluation, later, last = show_steps(io.StringIO(), monkeypatch).splitlines()
    assert first == "epoch 1  step 1/10  loss 0.5000  lr 1.00e-03  compute 60% of a dense step's"
    assert evaluation == "evaluation"
    assert later == (
        "epoch 1  step 6/10  loss 0.5000  lr 1.00e-03  accuracy 90.0%  compute 60% of a dense step's  "
        "1.000 s/step (forward and backward alone 80%)  40 images/s  0:04 left"
    )
    assert last.startswith("epoch 1  step 10/10")
    assert "  30% waiting for images  " in last


def test_passes_that_were_slower_alone_are_no_share_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    text = show_steps(io.StringIO(), monkeypatch, ideal_seconds=1.2)
    assert "  1.000 s/step  40 images/s  0:04 left" in text


def test_progress_on_a_terminal_is_one_line_that_renews_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = show_steps(Terminal(), monkeypatch)
    assert text.count("\n") == 2  # the evaluation, and the last step, which stays
    lines = text.replace("\n", "\r\x1b[K").split("\r\x1b[K")
    assert [line[:15] for line in lines[:3]] == [f"epoch 1  step {step}" for step in (1, 2, 3)]
    assert all(len(line) < 60 for line in lines[:-2])


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    progress = Progress(1, 10, 40, stream=stream)
    progress.say("something")
    assert not any(progress.is_due(step, 0.8) for step in range(1, 11))
    assert stream.getvalue() == ""


def record(step: int, **of_rank: float) -> StepRecord:
    with phases.timed_step(CPU) as times, phases.phase("forward"):
        pass
    figures = {"rank_samples": 4, "dense_flops": 2.0, "planned_flops": 1.0, "executed_flops": 1.0, **of_rank}
    return StepRecord(step, 0, 0, 0.1, torch.tensor(2.0), torch.tensor(0.5), times, figures)


def test_what_was_recorded_before_a_fault_is_kept(tmp_path: Path) -> None:
    with (  # noqa: PT012
        pytest.raises(RuntimeError),
        results.ResultsWriter(tmp_path / "results.h5") as writer,
        StepRecorder(SoloControl(), writer) as recorder,
    ):
        for step in range(3):
            recorder.add(record(step))
        raise RuntimeError("out of memory")
    with results.open(tmp_path) as run:
        steps = run.table("steps")
    assert steps["step"].tolist() == [0, 1, 2]
    assert steps["loss"].tolist() == [0.5] * 3
    assert steps["gradient_norm"].tolist() == [2.0] * 3
    assert steps["samples"].tolist() == [4] * 3
    assert (steps["waiting_seconds"] == 0).all()
    assert steps["full_rows"].tolist() == [[-1]] * 3  # not measured
    np.testing.assert_allclose(
        steps["forward_seconds"] + steps["other_seconds"], steps["step_seconds"], rtol=1e-5
    )


def test_waiting_for_images_is_told_without_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with StepRecorder(SoloControl(), None) as recorder:
        for step, seconds in enumerate((90.0, 1.0, 3.0)):
            marks = iter((0.0, 0.0, seconds, seconds, seconds + 2, seconds + 2))
            with monkeypatch.context() as clock:
                clock.setattr(phases.time, "perf_counter", lambda marks=marks: next(marks))
                with phases.timed_step(CPU) as times:
                    with phases.phase("data"):
                        pass
                    with phases.phase("forward"):
                        pass
            recorder.add(replace(record(step), times=times))
        assert recorder.share_of_waiting_for_data == 4 / 8


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install"):
        TensorBoard(tmp_path)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path / "tensorboard")
    with (
        results.ResultsWriter(tmp_path / "results.h5") as writer,
        StepRecorder(SoloControl(), writer, on_step=board.step) as recorder,
    ):
        for step in range(3):
            recorder.add(record(step))
    board.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [0.5] * 3
    assert [event.value for event in events.Scalars("compute/planned_share")] == [0.5] * 3
