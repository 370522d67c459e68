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
DEEPSPEED = [str(BESIDE / "deepspeed"), "--num_gpus", "2", "--master_port", "29645", "--module", SCRIPT]
JOBS = {
    "mpirun zero1": MPIRUN,
    "mpirun zero1-tensor": MPIRUN,
    "torchrun zero3": [str(BESIDE / "torchrun"), "--nproc_per_node=2", "--standalone", "-m", SCRIPT],
    "deepspeed zero1-pipeline": DEEPSPEED,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished() -> dict[str, dict[str, Any]]:
    def start(name: str) -> str:
        config = REPOSITORY / "configs" / "deepspeed" / f"{name.split()[1]}.json"
        job = run_command([*JOBS[name], "--deepspeed_config", str(config)])
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
    one, other = finished["mpirun zero1"], finished["torchrun zero3"]
    assert np.isfinite(one["losses"]).all()
    assert other["plan"] == one["plan"]
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-5)


def test_cut_models_train_in_the_same_loop(finished: dict[str, dict[str, Any]]) -> None:
    """One replica of two ranks; the first batch is dense, the others follow plans that fit the cut."""
    one, other = finished["mpirun zero1-tensor"], finished["deepspeed zero1-pipeline"]
    assert np.isfinite(one["losses"] + other["losses"]).all()
    np.testing.assert_allclose(other["losses"][0], one["losses"][0], rtol=1e-5)
    assert one["plan"] != other["plan"]
