"""Paths in configurations and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2ft_hpc.cli import main
from d2ft_hpc.config import read_config
from d2ft_hpc.errors import ConfigError

DEMO = Path("configs/demo.yaml")
KEYS = ("run.folder", "data.root", "model.weights", "plan.file")


@pytest.mark.parametrize("key", KEYS)
def test_the_home_folder_is_meant_by_a_tilde(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    section, name = key.split(".")

    def value(text: str) -> str:
        return str(getattr(getattr(read_config(DEMO, [f"{key}={text}"]), section), name))

    assert value("~/x") == f"{tmp_path}/x"
    assert value("a~/x~") == "a~/x~"
    assert value("./~name") == "./~name"


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("$SCRATCH/x", r"\$SCRATCH/x'?: variables are not filled in: write out what \$SCRATCH stands for"),
        ("x/$HOME", "write out what .HOME stands for"),
        ("~no-such-user-here/x", r"no such user; a folder of that name in this one is \./~no-such-user"),
        ('"a\\0b"', "no NUL"),
        ("x" * 256, "at most 4095 bytes, and 255 between two slashes"),
        ("x/" * 2048, "at most 4095 bytes"),
        ('"a\\udc80\\ud800b"', "characters that no file's name can have"),
    ],
)
def test_no_folder_is_named_after_what_a_path_cannot_be(key: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_config(DEMO, [f"{key}={text}"])
    assert str(caught.value).startswith(f"{key}=")
    assert "\n" not in str(caught.value)


def test_the_command_line_reads_paths_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["data", "info", "~/absent.h5"]) == 1
    assert f"{tmp_path}/absent.h5: no such file" in capfd.readouterr().err
    for arguments in (
        ["data", "pack", "arrays", "$OUT/x.h5", "--root", "x.npz"],
        ["report", "run", "--html", "$OUT/x.html"],
        ["plan", "run", "--save", "$OUT/plan.h5"],
        ["score", "$OUT/scores.h5", "demo.yaml"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "write out what $OUT stands for" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
