"""A user's own DeepSpeed script under every launcher; all jobs run at once on this host."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.launching import REPOSITORY, mpirun, run_command

SCRIPT = "tests.distributed.user_script"
BESIDE = Path(sys.executable).parent
MPIRUN = [mpirun(), "-n", "2", sys.executable, "-m", SCRIPT]
JOBS = {
    "mpirun zero1": MPIRUN,
    "mpirun zero0": MPIRUN,
    "torchrun zero2": [str(BESIDE / "torchrun"), "--nproc_per_node=2", "--standalone", "-m", SCRIPT],
    "deepspeed zero3": [str(BESIDE / "deepspeed"), "--num_gpus", "2", "--master_port", "29645", "--module", SCRIPT],
}  # fmt: skip


@pytest.fixture(scope="module")
def finished() -> dict[str, dict[str, Any]]:
    def start(name: str) -> str:
        config = REPOSITORY / "configs" / "deepspeed" / f"{name.split()[1]}.json"
        job = run_command([*JOBS[name], "--deepspeed_config", str(config)], timeout_seconds=300)
        assert job.returncode == 0, name + job.stdout + job.stderr
        return job.stdout

    with ThreadPoolExecutor() as pool:
        shown = dict(zip(JOBS, pool.map(start, JOBS), strict=True))
    found = {}
    for name, text in shown.items():
        # The deepspeed launcher mixes its ranks' lines.
        (results,) = [line.split("RESULTS ")[1] for line in text.splitlines() if "RESULTS " in line]
        assert "us a step, planning" in text
        found[name] = json.loads(results)
    return found


def test_all_launchers_and_stages_follow_the_same_plan_to_the_same_losses(
    finished: dict[str, dict[str, Any]],
) -> None:
    first = finished["mpirun zero1"]
    assert np.isfinite(first["losses"]).all()
    for name, other in finished.items():
        assert other["plan"] == first["plan"], name
        np.testing.assert_allclose(other["losses"], first["losses"], rtol=1e-5, err_msg=name)
