"""Checkpoints are whole or absent; runs start where they may; the run folder tells no secrets."""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.cluster.checkpoints import benchmark, report_text
from d2ft_hpc.config import RunConfig, read_config
from d2ft_hpc.engines.engine import MicroBatch, StateWriter, StepReport
from d2ft_hpc.errors import CheckpointError, ConfigError, ResultsError
from d2ft_hpc.launch.control import SoloControl
from d2ft_hpc.launch.watch import Watch
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.results import ResultsWriter
from d2ft_hpc.training import run_folder
from d2ft_hpc.training.checkpoint import (
    Position,
    complete_checkpoints,
    read_position,
    restore_checkpoint,
    verify,
)
from d2ft_hpc.training.resume import choose_start, fitted_to_ranks
from d2ft_hpc.training.saver import CheckpointSaver, snapshot

PLAN = SkipPlan.dense(2, 1, 3, 4)


def no_results() -> None:
    """Nothing to flush."""


class OneTensor:
    """An engine whose state is a tensor that every step changes."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(1000)

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepReport:
        self.tensor += 1
        return StepReport()

    def save(self, folder: Path, write: StateWriter) -> None:
        write({"tensor": self.tensor}, folder / "state.pt")

    def restore(self, folder: Path) -> None:
        self.tensor = torch.load(folder / "state.pt", weights_only=True)["tensor"]


def save_some(folder: Path, steps: int = 5, config: str = "") -> None:
    engine = OneTensor()
    with CheckpointSaver(folder, SoloControl(), config=config) as saver:
        for step in range(1, steps + 1):
            engine.step([])
            position = Position(steps_done=step, batches_done=step, plans_made=1, rows=2, ranks=1)
            saver.save(engine, PLAN, position, no_results)


def test_the_newest_are_kept_and_hold_what_was_there_when_they_were_saved(tmp_path: Path) -> None:
    save_some(tmp_path, steps=5)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000004", "step-00000005"]
    for checkpoint, step in zip(complete_checkpoints(tmp_path), (4, 5), strict=True):
        engine = OneTensor()
        assert restore_checkpoint(checkpoint, engine, SoloControl()) == PLAN
        assert engine.tensor.unique().tolist() == [step]
        assert read_position(checkpoint).steps_done == step


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    torch.manual_seed(3)
    save_some(tmp_path, steps=1)
    expected = torch.rand(3)
    torch.manual_seed(4)
    restore_checkpoint(complete_checkpoints(tmp_path)[0], OneTensor(), SoloControl())
    assert torch.equal(torch.rand(3), expected)


def test_every_damage_is_found(tmp_path: Path) -> None:
    save_some(tmp_path / "whole", steps=1)
    (whole,) = complete_checkpoints(tmp_path / "whole")
    names = [path.name for path in whole.iterdir()]
    assert set(names) == {"state.pt", "random-state-0.pt", "plan.h5", "position.json", "manifest.json"}
    for name in names:
        for damage in ("flip", "cut", "remove"):
            copy = shutil.copytree(whole, tmp_path / f"{name}-{damage}")
            content = bytearray((copy / name).read_bytes())
            if damage == "flip":
                content[len(content) // 2] ^= 1
                (copy / name).write_bytes(content)
            elif damage == "cut":
                (copy / name).write_bytes(content[: len(content) // 2])
            else:
                (copy / name).unlink()
            with pytest.raises(CheckpointError, match="damaged"):
                verify(copy)


def test_what_a_manifest_does_not_vouch_for_is_refused(tmp_path: Path) -> None:
    """Each time in a folder whose checksums are right."""
    save_some(tmp_path / "whole", steps=1)
    (whole,) = complete_checkpoints(tmp_path / "whole")
    (tmp_path / "outside.pt").write_bytes((whole / "state.pt").read_bytes())
    checksums = json.loads((whole / "manifest.json").read_text())
    of_state = checksums["state.pt"]

    def refused(reason: str, manifest: object, harm: Callable[[Path], object] = lambda folder: None) -> None:
        copy = shutil.copytree(whole, tmp_path / "copies" / "step-00000001", dirs_exist_ok=True)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        harm(copy)
        with pytest.raises(CheckpointError, match=f"step-00000001: damaged .*{reason}"):
            verify(copy)
        shutil.rmtree(copy)

    def linked(folder: Path) -> None:
        (folder / "state.pt").unlink()
        (folder / "state.pt").symlink_to(tmp_path / "outside.pt")

    def piped(folder: Path) -> None:
        (folder / "state.pt").unlink()
        os.mkfifo(folder / "state.pt")

    def deep(folder: Path) -> None:
        (folder / "/".join("d" * 20)).mkdir(parents=True)

    refused("8 folders in each other", checksums, deep)
    refused("does not have plan.h5", {})
    refused("no JSON object", [])
    refused("state.pt is not in its manifest", {n: c for n, c in checksums.items() if n != "state.pt"})
    refused("more.pt is missing", {**checksums, "more.pt": of_state})
    refused("not in the folder", {**checksums, "../../outside.pt": of_state})
    refused("not in the folder", {**checksums, str(tmp_path / "outside.pt"): of_state})
    refused("not in the folder", {**checksums, "./state.pt": of_state})
    refused("no SHA-256", {**checksums, "state.pt": 5})
    refused("state.pt is not a regular file", checksums, linked)
    refused("state.pt is not a regular file", checksums, piped)
    refused("manifest.json is not|regular file", checksums, lambda f: (f / "sub").symlink_to(tmp_path))
    (tmp_path / "step-00000001").symlink_to(whole)
    with pytest.raises(CheckpointError, match="symbolic link"):
        verify(tmp_path / "step-00000001")


@pytest.mark.parametrize(
    "harm",
    [
        {"steps_done": -5},
        {"steps_done": 10**18},
        {"steps_done": 4, "epochs_done": 5},
        {"epochs_done": -1},
        {"epochs_done": 10**18},
        {"batches_done": 6},
        {"rows": 2.0},
        {"ranks": True},
        {"more": 1},
    ],
)
def test_positions_that_no_run_comes_to_are_refused(tmp_path: Path, harm: dict[str, float]) -> None:
    save_some(tmp_path, steps=5)
    _, checkpoint = complete_checkpoints(tmp_path)
    position = json.loads((checkpoint / "position.json").read_text())
    (checkpoint / "position.json").write_text(json.dumps(position | harm))
    with pytest.raises(CheckpointError, match="step-00000005: damaged"):
        read_position(checkpoint)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in (
        "step-00000020",
        "step-00000003",
        "step-100000000",
        "step-4",
        "step-00000005.building",
        "step-x",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    names = [path.name for path in complete_checkpoints(tmp_path)]
    assert names == ["step-00000003", "step-00000020", "step-100000000"]


def test_a_half_written_checkpoint_is_none_and_is_removed_by_the_next(tmp_path: Path) -> None:
    save_some(tmp_path, steps=1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002.building")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000003.removing")
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000001"]
    save_some(tmp_path, steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_cannot_be_written_is_told_at_the_next_save(tmp_path: Path) -> None:
    engine = OneTensor()

    class Broken(OneTensor):
        def save(self, folder: Path, write: StateWriter) -> None:
            write({}, Path("/dev/full"))

    def save_twice() -> None:
        with CheckpointSaver(tmp_path, SoloControl()) as saver:
            saver.save(Broken(), PLAN, Position(steps_done=1), no_results)
            saver.save(engine, PLAN, Position(steps_done=2), no_results)

    with pytest.raises(CheckpointError, match="No space left"):
        save_twice()
    assert complete_checkpoints(tmp_path) == []


def test_a_snapshot_shares_nothing_with_the_state() -> None:
    state: Any = OrderedDict(
        a=torch.zeros(2), b=[torch.zeros(2), (torch.zeros(2), 3)], c={"d": torch.zeros(2)}
    )
    copied = snapshot(state)
    for tensor in (state["a"], state["b"][0], state["b"][1][0], state["c"]["d"]):
        tensor += 1
    assert copied["a"].sum() + copied["b"][0].sum() + copied["b"][1][0].sum() + copied["c"]["d"].sum() == 0
    assert type(copied) is OrderedDict
    assert copied["b"][1][1] == 3


def config_in(folder: Path, *overrides: str) -> RunConfig:
    return read_config(Path("configs/demo.yaml"), [f"run.folder={folder}", *overrides])


def begun(folder: Path, *overrides: str) -> RunConfig:
    """A run that has saved two checkpoints."""
    config = config_in(folder, *overrides)
    run_folder.record_launch(config, SoloControl(), {}, "the beginning")
    save_some(config.run_folder / "checkpoints", config=config.to_yaml())
    return config


def test_where_a_run_starts(tmp_path: Path) -> None:
    assert choose_start(config_in(tmp_path, "train.resume=auto"), SoloControl()).checkpoint is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        choose_start(config_in(tmp_path, "train.resume=true"), SoloControl())
    assert choose_start(config_in(tmp_path), SoloControl()).checkpoint is None
    begun(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.yaml exists already and is not overwritten.*resume=auto"):
        choose_start(config_in(tmp_path), SoloControl())
    for resume in ("auto", "true"):
        start = choose_start(config_in(tmp_path, f"train.resume={resume}", "train.epochs=9"), SoloControl())
        assert start.checkpoint is not None
        assert (start.checkpoint.name, start.position.steps_done) == ("step-00000005", 5)


@pytest.mark.parametrize("resume", ["false", "auto", "true"])
def test_a_run_that_another_process_writes_is_left_alone(tmp_path: Path, resume: str) -> None:
    """A checkpoint that is being replaced looks damaged, and is not to be removed by hand."""
    config = begun(tmp_path)
    (config.run_folder / "checkpoints" / "step-00000005" / "state.pt").unlink()
    with (
        ResultsWriter(config.run_folder / run_folder.RESULTS),
        pytest.raises(
            ResultsError, match=r"^where to start: another process writes this run \(.*lock is locked\)"
        ),
    ):
        choose_start(config_in(tmp_path, f"train.resume={resume}"), SoloControl())


def test_a_damaged_checkpoint_is_passed_over_where_nobody_can_choose(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = begun(tmp_path)
    (config.run_folder / "checkpoints" / "step-00000005" / "state.pt").write_bytes(b"")
    start = choose_start(config_in(tmp_path, "train.resume=auto"), SoloControl())
    assert start.checkpoint is not None
    assert start.checkpoint.name == "step-00000004"
    assert "passed over" in capfd.readouterr().err


def test_checkpoints_of_another_run_are_passed_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = begun(tmp_path / "own")
    other = begun(tmp_path / "other", "run.seed=1")
    name = Path("checkpoints") / "step-00000005"
    shutil.rmtree(config.run_folder / name)
    shutil.copytree(other.run_folder / name, config.run_folder / name)
    start = choose_start(config_in(tmp_path / "own", "train.resume=auto", "train.epochs=9"), SoloControl())
    assert start.checkpoint is not None
    assert start.checkpoint.name == "step-00000004"
    assert "of another run: run.seed=0" in capfd.readouterr().err
    with pytest.raises(CheckpointError, match="of another run"):
        choose_start(config_in(tmp_path / "own", "train.resume=true"), SoloControl())
    assert (config.run_folder / name).is_dir()


def test_a_configuration_that_a_power_cut_emptied(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = begun(tmp_path)
    (config.run_folder / "config.yaml").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        choose_start(config_in(tmp_path, "train.resume=true"), SoloControl())
    start = choose_start(config_in(tmp_path, "train.resume=auto"), SoloControl())
    assert start.checkpoint is not None
    assert start.checkpoint.name == "step-00000005"
    assert "goes on by the configuration that checkpoints hold" in capfd.readouterr().err
    # Another configuration is still known to be one.
    with pytest.raises(CheckpointError, match=r"run\.seed=1: the run in .* was begun with 0"):
        choose_start(config_in(tmp_path, "train.resume=auto", "run.seed=1"), SoloControl())


@pytest.mark.parametrize("resume", ["false", "auto"])
@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("file/x", r"^where to start: run\.folder=.*Not a directory\); choose another folder"),
        ("d" * 300, r"^run\.folder=.*: a path has at most 4095 bytes, and 255 between two slashes$"),
    ],
)
def test_a_folder_that_cannot_be_is_refused_by_key_before_any_work(
    tmp_path: Path, folder: str, told: str, resume: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=told):
        choose_start(config_in(tmp_path / folder, f"train.resume={resume}"), SoloControl())


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.seed=1: the run in .* was begun with 0; .* run\.name"):
        choose_start(config_in(tmp_path, "train.resume=auto", "run.seed=1"), SoloControl())


@pytest.mark.parametrize(("ranks", "slots"), [(1, 12), (2, 6), (3, 4), (12, 1)])
def test_other_ranks_share_the_same_rows(tmp_path: Path, ranks: int, slots: int) -> None:
    config = config_in(tmp_path, "data.slots=3")
    assert fitted_to_ranks(config, Position(rows=12), ranks).data.slots == slots


def test_ranks_that_cannot_share_the_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume it on 1, 2, 3, 4, 6 or 12 ranks"):
        fitted_to_ranks(config_in(tmp_path, "data.slots=3"), Position(rows=12), 5)


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors"])
@pytest.mark.parametrize("resume", ["false", "auto", "true"])
def test_what_is_no_run_is_not_written_over(tmp_path: Path, resume: str, name: str) -> None:
    config = config_in(tmp_path, f"train.resume={resume}")
    config.run_folder.mkdir(parents=True)
    (config.run_folder / name).write_text("a: stranger's")
    with pytest.raises(ConfigError, match=rf"{name}.*not overwritten.*run\.name"):
        choose_start(config, SoloControl())


def test_launches_are_recorded_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_JWT", "NCCL_DEBUG", "HF_HUB_TOKEN", "OMP_API_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, "planted")
    monkeypatch.setenv("SLURM_EXPORT_ENV", "ALL,HF_TOKEN=secret")
    monkeypatch.setenv("SLURM_JOB_NAME", "ALL,HF_TOKEN=secret,proxy=http://me:secret@host:3128/")
    config = begun(tmp_path)
    text = (config.run_folder / "launches.jsonl").read_text()
    (line,) = [json.loads(line) for line in text.splitlines()]
    assert {name for name, value in line["variables"].items() if value == "planted"} == {
        "SLURM_JOB_ID",
        "NCCL_DEBUG",
    }
    assert text.count("planted") == 2
    assert "secret" not in text
    assert line["variables"]["SLURM_JOB_NAME"] == "ALL,HF_TOKEN=***,proxy=http://***@host:3128/"
    assert len(line["code"]["sources_sha256"]) == 64
    assert run_folder.saved_config(config.run_folder) is not None


def test_the_cost_of_saves_is_measured_in_turns_and_leaves_nothing(tmp_path: Path) -> None:
    config = config_in(tmp_path, "data.micro_batch_size=2", "data.slots=1", "engine.name=plain")
    control = SoloControl()
    with Watch(control) as watch:
        measured = benchmark(config, control, torch.device("cpu"), watch, steps=1, pairs=3)
    assert len(measured["seconds_with_save"]) == len(measured["seconds_without"]) == 3
    assert measured["checkpoint_bytes"] > 4 * 1e6  # the demo model's parameters in fp32, and AdamW's moments
    ratios = sorted(
        a / b for a, b in zip(measured["seconds_with_save"], measured["seconds_without"], strict=True)
    )
    assert measured["save_seconds"][0] == pytest.approx((ratios[1] - 1) * measured["step_seconds"])
    assert "costs it" in report_text(measured, as_json=False)
    assert json.loads(report_text(measured, as_json=True)) == measured
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_by_its_key(tmp_path: Path) -> None:
    """Where nothing showed it before: /proc looks writable to root, a launches.jsonl may be a folder."""
    config = read_config(Path("configs/demo.yaml"), ["run.folder=/proc/x"])
    with pytest.raises(
        ConfigError, match=r"^run\.folder='/proc/x': no run can be written there \(No such file"
    ):
        run_folder.record_launch(config, SoloControl(), {}, "the beginning")
    config = config_in(tmp_path)
    (config.run_folder / run_folder.LAUNCHES).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no run can be written there \(Is a directory\); choose another"):
        run_folder.record_launch(config, SoloControl(), {}, "the beginning")
