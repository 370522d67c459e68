"""Signals that come while a command is still being imported wait for who knows what they mean."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from d2ft_hpc import early_signals
from d2ft_hpc.cli import main
from d2ft_hpc.errors import UNFINISHED

SIGNALLED = """
import os, signal, sys
from d2ft_hpc import early_signals
early_signals.hold()
os.kill(os.getpid(), signal.SIGTERM)
"""
LISTENS = """
from d2ft_hpc.launch.signals import StopSignals
signals = StopSignals(sys.argv[1:])
signals.receive_here()
print(signals.caught())
"""
STARTS_A_WORKER = """
import multiprocessing
from multiprocessing import resource_tracker
from d2ft_hpc.launch.signals import StopSignals
StopSignals(sys.argv[1:])
tracker = resource_tracker._resource_tracker
worker = multiprocessing.get_context("spawn").Process(target=int)
for name in sys.argv[1:]:
    os.killpg(0, getattr(signal, f"SIG{name}"))
worker.start()
worker.join()
print(worker.exitcode, tracker._check_alive())
"""
OTHER_COMMAND = """
from d2ft_hpc.cli import main
main(["data", "info", "absent.h5"])
print("goes on")
"""


@pytest.mark.parametrize(
    ("program", "names", "status", "said"),
    [
        (LISTENS, ["USR2", "TERM"], 0, "TERM\n"),
        (LISTENS, ["USR1"], -signal.SIGTERM, ""),
        (OTHER_COMMAND, [], -signal.SIGTERM, ""),
    ],
)
def test_a_signal_comes_to_who_listens_and_ends_all_others(
    program: str, names: list[str], status: int, said: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SIGNALLED + program, *names], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (status, said)


def test_a_signal_to_the_whole_group_leaves_what_workers_need_alive() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import os, signal, sys" + STARTS_A_WORKER, "USR1", "USR2", "TERM"],
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0 True\n", "")


def test_of_several_runs_none_begins_after_a_signal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file in files:
        file.write_text(Path("configs/demo.yaml").read_text())
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        early_signals.hold()
        # To this thread alone: other tests' threads, such as pyarrow's, let it through.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
        assert main(["train", *map(str, files)]) == UNFINISHED
    finally:
        early_signals.release()
        for number, handler in before.items():
            signal.signal(number, handler)
    shown = capfd.readouterr()
    assert "==>" not in shown.out
    assert f"unfinished: {files[0]}, {files[1]}; to go on" in shown.err
