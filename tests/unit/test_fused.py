"""The GPU's fused blocks, run by Triton's interpreter in a process of its own: the choice is made at import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.full
def test_fused_blocks_equal_the_reference() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fused_checks"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fused blocks: ok" in done.stdout
