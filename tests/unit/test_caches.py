"""Caches of compiled code go where they can be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from d2ft_hpc.launch.caches import make_caches_usable

VARIABLES = ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_a_home_that_can_be_written_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_caches_usable(tells=True)
    assert not set(VARIABLES) & set(os.environ)
    assert capfd.readouterr().err == ""


def test_without_such_a_home_they_go_into_a_folder_of_nobody_elses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/chosen")
    make_caches_usable(tells=True)
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/chosen"
    folder = Path(os.environ["TRITON_CACHE_DIR"]).parent
    assert folder == tmp_path / f"d2ft-hpc-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert "~/.triton/cache cannot be written: TRITON_CACHE_DIR=" in capfd.readouterr().err
    folder.chmod(0o777)  # others could put code into it
    del os.environ["TRITON_CACHE_DIR"]
    make_caches_usable(tells=False)
    assert Path(os.environ["TRITON_CACHE_DIR"]).parent != folder
    assert capfd.readouterr().err == ""
