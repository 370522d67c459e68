"""Faults of settings and environments that are told before work is spent: key, value and fix, in one line, once."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2ft_hpc.cli import main
from d2ft_hpc.config import read_config
from d2ft_hpc.data.decoding import look
from d2ft_hpc.engines.deepspeed_keys import unknown_keys
from d2ft_hpc.errors import ConfigError, DataError
from d2ft_hpc.launch.control import SoloControl
from d2ft_hpc.launch.environment import likely_rank
from d2ft_hpc.model.build import build_model
from d2ft_hpc.model.hub import unreachable
from d2ft_hpc.training.job import set_up
from tests.splits import open_images

DEMO = Path("configs/demo.yaml")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"zero_optimisation": {}}, r"^zero_optimisation: .* did you mean zero_optimization\?"),
        (
            {"zero_optimization": {"stag": 1}},
            r"zero_optimization\.stag: .* did you mean zero_optimization\.stage\?",
        ),
        ({"tensor_parallel": {"autotp_sise": 2}}, r"did you mean tensor_parallel\.autotp_size\?"),
        ({"no_such_thing_at_all": 1}, r"^no_such_thing_at_all: unknown key of DeepSpeed .* remove it"),
    ],
)
def test_keys_that_deepspeed_cannot_know_are_found_without_it(settings: dict[str, Any], told: str) -> None:
    (line,) = unknown_keys(settings)
    assert re.search(told, line)
    (key, value), *_ = settings.items()
    with pytest.raises(ConfigError, match=rf"^engine\.deepspeed\.{key}") as caught:
        read_config(DEMO, [f"engine.deepspeed.{key}={json.dumps(value)}"])
    assert str(caught.value) == f"engine.deepspeed.{line}".replace(
        "did you mean ", "did you mean engine.deepspeed."
    )


def test_keys_that_deepspeed_and_others_read_pass() -> None:
    settings = {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamW", "params": {"my_own_option": 1}},
        "pipeline": {"use_reentrant": False},
        "sequence_parallel_size": 1,
    }
    assert not list(unknown_keys(settings))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.root=''", r"^data\.root='': empty: write a path, or leave it out$"),
        ("model.options=3", r"^model\.options=3: holds settings of its own, \{KEY: VALUE\}$"),
        ("model={a: 1}", r"^model\.a: unknown key \(value 1\); valid here|did you mean model\.\w+"),
    ],
)
def test_faults_of_settings_in_words(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_config(DEMO, [override])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ("data.micro_batch_size=100000",),
            r"data\.micro_batch_size=100000: there are \d+ training images; use at",
        ),
        (("data.classes=[3]",), "all images are of one class"),
        (("model.lora={rank: 1000}",), r"model\.lora\.rank=1000: blocks\.0\.attn\.qkv is .* at most \d+"),
        (("data.train_fraction=0.001",), r"data\.train_fraction=0\.001: .* cannot keep every class"),
    ],
)
def test_more_than_there_is(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises((ConfigError, DataError), match=told):
        set_up(read_config(DEMO, [*overrides, "engine.name=plain"]), SoloControl(), torch.device("cpu"))


def test_an_engine_of_one_process_is_refused_on_several_ranks() -> None:
    class TwoRanks(SoloControl):
        world_size = 2

        def __init__(self) -> None:
            self.rank = 0

    with pytest.raises(ConfigError, match=r"engine\.name=plain trains in one process, and 2 ranks .* ddp"):
        set_up(read_config(DEMO, ["engine.name=plain"]), TwoRanks(), torch.device("cpu"))


def test_fp16_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"engine\.precision=fp16: needs a GPU, .* set bf16"):
        set_up(read_config(DEMO, ["engine.precision=fp16"]), SoloControl(), torch.device("cpu"))


def test_a_batch_of_more_images_than_there_are_is_a_remark() -> None:
    config = read_config(DEMO, ["data.micro_batch_size=300", "engine.name=plain"])
    (remark,) = set_up(config, SoloControl(), torch.device("cpu")).remarks
    assert re.match(r"data\.micro_batch_size=300: a batch of 5 micro-batches would take 1500 images", remark)


def test_classes_without_training_images_are_a_remark(tmp_path: Path) -> None:
    """As where labels begin with 1."""
    labels = np.arange(12) % 2 * 2 + 1
    images = np.zeros((12, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    assert main(["data", "pack", "arrays", str(tmp_path / "a.h5"), "--root", str(tmp_path / "a.npz")]) == 0
    own = ("data.name=packed", f"data.root={tmp_path}/a.h5", "data.classes=null", "data.slots=1")
    (remark,) = set_up(
        read_config(DEMO, ["engine.name=plain", *own]), SoloControl(), torch.device("cpu")
    ).remarks
    assert remark == (
        f"data.root={tmp_path}/a.h5: no training image is of 2 of the 4 classes (labels 0, 2), which cannot be "
        "learned; add images of them, or number the classes 0, 1, ... without a gap"
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ((), []),
        (
            ("model.weights=null",),
            ["model.weights=null: all weights are random, and those below the blocks stay"],
        ),
        (("model.weights=null", "model.embeddings=trained"), []),
    ],
)
def test_random_weights_that_never_train_are_a_remark(settings: tuple[str, ...], told: list[str]) -> None:
    config = read_config(DEMO, ["engine.name=plain", *settings])
    remarks = set_up(config, SoloControl(), torch.device("cpu")).remarks
    assert [remark.partition(" as they are")[0] for remark in remarks] == told


def test_a_model_that_cannot_be_written_tells_the_setting_that_goes_on(tmp_path: Path) -> None:
    settings = ["data.train_fraction=0.1", "data.slots=1", "train.epochs=1", "plan.planner=dense"]
    command = [
        sys.executable,
        "-m",
        "d2ft_hpc",
        "train",
        str(DEMO),
        f"run.folder={tmp_path}",
        "engine.name=plain",
    ]

    def start(*more: str, most_kib: str) -> tuple[int, str]:
        limited = ["bash", "-c", 'ulimit -f "$0"; exec "$@"', most_kib, *command, *settings, *more]
        ended = subprocess.run(limited, capture_output=True, text=True, timeout=120, check=False)
        return ended.returncode, ended.stderr

    status, told = start(most_kib="150")
    assert status == 1
    (setting,) = re.findall(
        r"trained model cannot be written: .* start again with (\S+)$", told, re.MULTILINE
    )
    assert start(setting, most_kib="unlimited")[0] == 0  # there is no checkpoint
    assert (tmp_path / "demo" / "model.safetensors").is_file()


def test_misspelt_options_of_models() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.options\.depht=2: .* did you mean model\.options\.depth\?"
    ):
        build_model("vit_tiny_patch16_224", num_classes=2, options={"depht": 2})
    with pytest.raises(ConfigError, match=r"model\.options\.qwertzuiop=2: .*; remove it"):
        build_model("vit_tiny_patch16_224", num_classes=2, options={"qwertzuiop": 2})


def test_servers_and_proxies_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = f"127.0.0.1:{server.getsockname()[1]}"
        assert unreachable(f"http://{here}") == ""
        monkeypatch.setenv("https_proxy", f"http://{here}")
        assert unreachable("https://nowhere.invalid") == ""
    assert unreachable("https://nowhere.invalid") == "no connection to 127.0.0.1: Connection refused"
    monkeypatch.setenv("https_proxy", "http://proxy:port")
    assert "correct HTTPS_PROXY" in unreachable("https://nowhere.invalid")


def encoded(format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(file, format)
    return file.getvalue()


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_images_that_are_cut_short_are_found_among_those_that_are_looked_at(
    format: str, tmp_path: Path
) -> None:
    whole = encoded(format)
    look(whole)
    look(whole + b"some camera's own data")
    for cut in (whole[: len(whole) // 2], whole[:10], b""):
        with pytest.raises(DataError, match="not a readable image"):
            look(cut)
    for split, name in ((split, name) for split in ("train", "test") for name in ("cat", "dog")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "whole").with_suffix(f".{format.lower()}").write_bytes(whole)
    images = open_images("image_folder", root=tmp_path, split="train", image_size=8)
    images.look_at_some()
    (tmp_path / "train" / "dog" / "whole").with_suffix(f".{format.lower()}").write_bytes(
        whole[: len(whole) // 2]
    )
    with pytest.raises(DataError, match=r"train/dog/whole\.\w+: not a readable image"):
        images.look_at_some()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["doctor"], "arguments are required: config\n"),
        (["plan", "run", "--compute-budget", "nan"], "'nan' is not a share above 0, at most 1"),
        (["plan", "run", "--speeds", "1,-2"], "--speeds: '-2' is not a number above 0"),
        (["plan", ""], "'': empty: write a path"),
        (["bench", "step", "--micro-batch", "0"], "'0' is not a whole number, at least 1"),
    ],
)
def test_arguments(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert told in capsys.readouterr().err


def test_scores_replace_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "config.yaml"
    own.write_text(DEMO.read_text())
    assert main(["score", str(own), str(DEMO), "engine.name=plain", "engine.device=cpu"]) == 1
    assert "exists and is no file of scores" in capfd.readouterr().err
    assert own.read_text() == DEMO.read_text()


def test_scores_that_could_not_be_written_are_not_measured(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "scores.h5"
    assert main(["score", str(output), str(DEMO), "engine.name=plain", "engine.device=cpu"]) == 1
    assert f"{output}: cannot be written ({str(tmp_path / 'file')!r}: Not a dir" in capfd.readouterr().err


def test_the_rank_in_a_faulty_environment() -> None:
    assert likely_rank({}) == 0
    assert likely_rank({"RANK": "0", "PMI_RANK": "3"}) == 3
    assert likely_rank({"PMI_RANK": "abc"}) == 0


def test_a_faulty_environment_is_told_once_a_host() -> None:
    command = [sys.executable, "-m", "d2ft_hpc", "train", str(DEMO)]
    environment = {**os.environ, "MASTER_PORT": "abc"}
    ranks = [
        subprocess.Popen(
            command,
            env={**environment, "PMI_RANK": str(rank), "PMI_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = "".join(rank.communicate()[1] for rank in ranks)
    assert told.count("MASTER_PORT='abc' is not a whole number") == 1
    assert [rank.returncode for rank in ranks] == [1, 1]


PARENT = """
import sys
from d2ft_hpc.launch.command_runner import CommandRunner
CommandRunner(["USR2"]).run([sys.executable, "-c", sys.argv[1], sys.argv[2]], ["USR2"])
"""
CHILD = """
import os, sys, time
open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""


def test_a_killed_parent_takes_its_command_with_it(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(begun)])
    while not begun.exists():
        assert parent.poll() is None
        time.sleep(0.05)
    child = int(begun.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(600):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the command lives on")
