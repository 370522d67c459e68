"""`train A.yaml B.yaml ...`: signals go to the run that is under way, and an unfinished one is the last."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2ft_hpc.cli import main
from d2ft_hpc.errors import UNFINISHED
from d2ft_hpc.launch.command_runner import CommandRunner

ON_SIGNAL = """
import os, signal, sys, time
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))
open(sys.argv[1], "w").close()
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
time.sleep(60)
"""


@pytest.fixture
def children() -> Iterator[CommandRunner]:
    before = signal.getsignal(signal.SIGUSR2)
    yield CommandRunner(["USR2"])
    signal.signal(signal.SIGUSR2, before)


def signal_when(path: Path) -> threading.Thread:
    def wait_and_signal() -> None:
        while not path.exists():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGUSR2)

    thread = threading.Thread(target=wait_and_signal)
    thread.start()
    return thread


def test_a_signal_is_passed_on_and_its_status_comes_back(children: CommandRunner, tmp_path: Path) -> None:
    sender = signal_when(tmp_path / "listens")
    assert children.run([sys.executable, "-c", ON_SIGNAL, str(tmp_path / "listens")], ["USR2"]) == UNFINISHED
    sender.join()
    assert children.stopped


def test_a_command_that_does_not_listen_yet_is_unfinished(children: CommandRunner, tmp_path: Path) -> None:
    sender = signal_when(tmp_path / "begun")
    command = [sys.executable, "-c", f"open({str(tmp_path / 'begun')!r}, 'w'); import time; time.sleep(60)"]
    assert children.run(command, []) == UNFINISHED
    sender.join()


def test_a_settings_value_may_end_like_a_files_name(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "configs/demo.yaml", "data.name=image_folder", "data.root=absent/photos.yaml"]) == 1
    assert "data.root=absent/photos.yaml: no such folder" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("statuses", "expected", "begun"),
    [
        ({}, 0, "abc"),
        ({"b": 1}, 1, "abc"),
        ({"b": 76}, 1, "abc"),
        ({"b": 75}, 75, "ab"),
        ({"c": 75}, 75, "abc"),
        ({"a": 130}, 130, "a"),
    ],
)
def test_an_unfinished_run_is_the_last(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    statuses: dict[str, int],
    expected: int,
    begun: str,
) -> None:
    """The interpreter that starts the runs ends at once, with the status asked for."""
    python = tmp_path / "python"
    cases = "".join(f"*/{name}.yaml) exit {status};; " for name, status in statuses.items())
    python.write_text(f'#!/bin/sh\ncase "$4" in {cases}esac\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    files = [tmp_path / f"{name}.yaml" for name in "abc"]
    for file in files:
        file.write_text(Path("configs/demo.yaml").read_text())
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        assert main(["train", *map(str, files)]) == expected
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    shown = capfd.readouterr()
    assert [line for line in shown.out.splitlines() if line.startswith("==>")] == [
        f"==> {tmp_path / name}.yaml" for name in begun
    ]
    assert ("start again with train.resume=auto" in shown.err) == (expected == 75)
