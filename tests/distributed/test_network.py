"""The network bench, small: bytes that leave the ranks' interfaces are those that were counted and predicted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analysis.network.slow_links import why_not_permitted
from d2ft_hpc.planning.communication_volume import LAYOUTS
from tests.distributed.launching import LIMIT_SECONDS, REPOSITORY, run

SMALL = ["-m", "analysis.network.slow_links", "--rate", "1gbit", "--tp", "2", "--blocks", "2"]
SMALL += ["--micro-batches", "2", "--samples", "2", "--repeats", "1", "--json"]

WHY_NOT = why_not_permitted()
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"network namespaces: {WHY_NOT}"),
]


def links() -> str:
    shown = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return "\n".join(line.split(":")[1] for line in shown.splitlines()) + names


def test_interfaces_send_what_was_counted_and_predicted() -> None:
    before = links()
    finished = run(SMALL)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    for name in ("dense", "paper", "makespan"):
        of_plan = result[name]
        assert of_plan["counted_bytes"] == pytest.approx(of_plan["model_bytes"], rel=0.02), name
        # Headers, acknowledgements and the barriers around a step come on top.
        assert 1 <= of_plan["interface_bytes"] / of_plan["counted_bytes"] <= 1.1, name
        assert of_plan["bytes_ratio"] == pytest.approx(of_plan["ideal_bytes_ratio"], abs=0.03), name
    assert result["makespan"]["token_layout"] in LAYOUTS
    assert result["makespan"]["ideal_bytes_ratio"] < 0.8
    assert links() == before


def test_nothing_is_left_after_a_kill() -> None:
    before = links()
    job = subprocess.Popen(
        [sys.executable, *SMALL],
        cwd=REPOSITORY,
        env={**os.environ, "D2FT_MARK": str(os.getpid())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    patience = time.monotonic() + LIMIT_SECONDS
    while len(ours()) < 4:  # the command, the keeper of the bridge, two ranks
        assert time.monotonic() < patience
        time.sleep(0.1)
    job.send_signal(signal.SIGKILL)
    job.wait()
    patience = time.monotonic() + LIMIT_SECONDS
    while ours():
        assert time.monotonic() < patience, ours()
        time.sleep(0.1)
    assert links() == before


def ours() -> list[int]:
    """Processes that the test's command started, itself included."""
    mark = f"D2FT_MARK={os.getpid()}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and entry.name != str(os.getpid()):
            try:
                environ = (entry / "environ").read_bytes()
            except OSError:
                continue
            if mark in environ:
                found.append(int(entry.name))
    return found
