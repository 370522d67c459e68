"""The doctor on one process: findings, fixes and exit status."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from d2ft_hpc.cli import main
from d2ft_hpc.doctor.examine import seconds_left
from d2ft_hpc.doctor.finding import Finding, as_text, of_error
from d2ft_hpc.errors import DataError, LaunchError


def doctor(_: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and findings by check, of a process of its own."""
    command = [sys.executable, "-m", "d2ft_hpc", "doctor", "--json", "configs/demo.yaml", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, ended.stdout + ended.stderr
    return ended.returncode, {finding["check"]: finding for finding in json.loads(lines[0])["findings"]}


def doctor_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """The same within this process."""
    status = main(["doctor", "--json", "configs/demo.yaml", *arguments])
    return status, {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}


@pytest.mark.parametrize("run", [doctor_here, pytest.param(doctor, marks=pytest.mark.full)])
def test_a_healthy_place_is_found_healthy(
    run: Callable[..., tuple[int, dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = run(capsys, f"run.folder={tmp_path}/new")
    assert status == 0
    assert {"ranks", "versions", "gpus", "output", "data", "model", "space", "time"} <= set(found)
    assert {finding["status"] for finding in found.values()} == {"ok"}
    assert found["ranks"]["text"].startswith("1 rank on 1 host by ")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_an_absent_gpu_is_found_once_and_hides_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = doctor_here(capsys, f"run.folder={tmp_path}/new", "engine.device=cuda")
    assert status == 1
    assert found["gpus"]["text"].startswith("engine.device=cuda: torch ")
    assert found["gpus"]["fix"].startswith("set engine.device=cpu, or start on a GPU node")
    assert {finding["status"] for check, finding in found.items() if check != "gpus"} == {"ok"}
    assert {"data", "model", "plan"} <= set(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("bench", ["speed", "step"])
def test_an_absent_gpu_is_told_by_how_it_was_asked_for(bench: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", bench, "--device", "cuda"]) == 1
    told = capfd.readouterr().err
    assert " --device cuda: torch " in told
    assert "; set --device cpu, or" in told


def test_images_are_read_with_the_transforms_of_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = doctor_here(capsys, f"run.folder={tmp_path}/new", "data.augment=timm")
    assert status == 0
    assert found["model"]["status"] == found["data"]["status"] == "ok"


def test_every_fault_has_its_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    status, found = doctor_here(
        capsys, f"run.folder={tmp_path}/file/runs", "data.name=cifar10", "data.root=/absent"
    )
    assert status == 1
    failed = {check: finding for check, finding in found.items() if finding["status"] == "failed"}
    assert set(failed) == {"output", "data"}
    assert "run.folder" in failed["output"]["fix"]
    assert "/absent" in failed["data"]["text"] + failed["data"]["fix"]


@pytest.mark.parametrize(
    ("arguments", "failed", "ok"),
    [
        (["data.name=cifar10", "data.root=/absent", "model.name=vit_tinny"], {"data", "model"}, {"output"}),
        (["data.name=cifar10", "data.root=/absent"], {"data"}, {"output", "model", "space"}),
        (["model.name=vit_tinny"], {"model"}, {"output", "data"}),
        (["data.micro_batch_size=9999", "model.weights=/absent"], {"data", "model"}, {"output"}),
        (["engine.pipeline_stages=2"], {"config"}, {"output", "data", "model", "space"}),
    ],
    ids=["data and model", "data", "model", "batches and weights", "ranks"],
)
def test_what_failed_hides_nothing_else(
    arguments: list[str], failed: set[str], ok: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = doctor_here(capsys, f"run.folder={tmp_path}", *arguments)
    assert status == 1
    assert {check for check, finding in found.items() if finding["status"] == "failed"} == failed
    assert all(found[check]["status"] == "ok" for check in ok)


def test_a_damaged_image_does_not_hide_plan_and_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(40):  # the last one of the second class is cut short
        folder = tmp_path / "images" / ("train" if number < 30 else "test") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 80).convert("RGB").save(folder / f"{number}.png")
    damaged = tmp_path / "images" / "train" / "b" / "29.png"
    content = bytearray(damaged.read_bytes())
    content[200:400] = bytes(200)
    damaged.write_bytes(content)
    data = ["data.name=image_folder", f"data.root={tmp_path / 'images'}", "data.micro_batch_size=2"]
    status, found = doctor_here(capsys, f"run.folder={tmp_path}", "data.classes=null", *data)
    assert status == 1
    assert found["data"]["status"] == "failed"
    assert {found[check]["status"] for check in ("model", "space", "plan", "time")} == {"ok"}


def test_a_run_that_is_there_already_is_found_before_train_refuses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "model.safetensors").touch()
    status, found = doctor_here(capsys, f"run.folder={tmp_path}")
    assert status == 1
    assert "model.safetensors exists already and is not overwritten" in found["run"]["text"]


def test_a_wrong_key_is_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = doctor_here(capsys, "run.foldr=x")
    assert status == 1
    assert "run.folder" in found["config"]["fix"] + found["config"]["text"]


@pytest.mark.parametrize(
    ("error", "text", "fix"),
    [
        (LaunchError("the port is in use. Unset MASTER_PORT."), "the port is in use", "Unset MASTER_PORT."),
        (DataError("/x: missing; unpack it there"), "/x: missing", "unpack it there"),
        (RuntimeError("no message of ours"), "no message of ours", "the general fix"),
    ],
)
def test_an_errors_last_words_are_its_fix(error: Exception, text: str, fix: str) -> None:
    finding = of_error("check", error, "the general fix")
    assert (finding.text, finding.fix) == (text, fix)
    assert f"fix: {fix}" in as_text([finding])


def test_a_finding_without_a_fix_is_one_line() -> None:
    assert as_text([Finding("ranks", "ok", "4 ranks")]) == "ok       ranks      4 ranks"


def test_the_time_limit_is_what_slurm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert seconds_left() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    assert seconds_left() == pytest.approx(3600, abs=30)
