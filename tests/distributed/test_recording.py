"""Records of several ranks reach the file although no rank waits for another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from d2ft_hpc import results
from tests.distributed.launching import run

pytestmark = pytest.mark.full

PROGRAM = str(Path(__file__).with_name("recording_ranks.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_no_rank_waits_for_another(tmp_path: Path, launcher: str) -> None:
    ranks = 3 if launcher == "mpirun" else 2
    if launcher == "mpirun":
        finished = run([PROGRAM, str(tmp_path)], ranks=ranks)
    else:
        finished = run([*TORCHRUN, PROGRAM, str(tmp_path)])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    with results.open(tmp_path) as opened:
        steps = opened.table("steps")
    assert steps["step"].tolist() == list(range(30))
    np.testing.assert_array_equal(steps["dense_flops"], 100.0 * np.arange(30)[:, None] + np.arange(ranks))
    assert steps["loss"].tolist() == [(ranks - 1) / 2] * 30
    assert steps["samples"].tolist() == [4 * ranks] * 30
