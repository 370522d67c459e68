"""A user's own DeepSpeed script under every launcher; all jobs run at once on this host."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2ft_hpc import results
from d2ft_hpc.report import report
from tests.distributed.launching import REPOSITORY, free_port, mpirun, run_command

pytestmark = pytest.mark.full
SCRIPT = "tests.distributed.user_script"
BESIDE = Path(sys.executable).parent
MPIRUN = [mpirun(), "-n", "2", sys.executable, "-m", SCRIPT]
DEEPSPEED = [str(BESIDE / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}", "--module", SCRIPT]
JOBS = {
    "mpirun zero1": MPIRUN,
    "mpirun zero1-tensor": MPIRUN,
    "torchrun zero3": [str(BESIDE / "torchrun"), "--nproc_per_node=2", "--standalone", "-m", SCRIPT, "--wrapped"],
    "deepspeed zero1-pipeline": DEEPSPEED,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(folder: Path) -> dict[str, dict[str, Any]]:
    def start(name: str) -> str:
        settings = json.loads((REPOSITORY / "configs" / "deepspeed" / f"{name.split()[1]}.json").read_text())
        settings["d2ft"]["results"] = str(folder / name)
        config = folder / f"{name}.json"
        config.write_text(json.dumps(settings))
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


@pytest.mark.parametrize("name", JOBS)
def test_the_record_of_every_engine_has_what_all_ranks_computed(
    finished: dict[str, dict[str, Any]], folder: Path, name: str
) -> None:
    with results.open(folder / name) as run:
        assert run.complete
        assert run.rank_files == 2
        steps = run.table("steps")
        assert steps["step"].tolist() == [0, 1, 2, 3]
        assert steps["plan"].tolist() == [-1, 0, 0, 0]
        assert run.table("plans")["hash"].tolist() == [finished[name]["plan"]]
        np.testing.assert_allclose(steps["executed_flops"][1:], steps["planned_flops"][1:], rtol=1e-3)
        # The first one also sends what plans are made of; under ZeRO 3 the second, which is the one that is counted,
        # gathers all that it keeps whole once more.
        more = 0.25 if "zero3" in name else 0.05
        assert (steps["bytes_sent"][1:] >= 0.95 * steps["planned_bytes"][1:]).all()
        assert (steps["bytes_sent"][1:] <= (1 + more) * steps["planned_bytes"][1:]).all()
        assert np.isfinite(steps["gradient_norm"]).all()
        assert (steps["memory_bytes"] > 2**20).all()
        if "pipeline" not in name:  # whose loss is that of all stages
            np.testing.assert_allclose(steps["loss"], finished[name]["losses"], rtol=1e-5)
    assert name in report([folder / name])
