"""The scripts of slurm/ as users submit them, on a real Slurm of four virtual nodes."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

import h5py
import numpy as np
import pytest

from d2ft_hpc.config import EngineConfig
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.results import open_run
from d2ft_hpc.training.checkpoint import complete_checkpoints
from tests.slurm.cluster import ENDED, REPOSITORY, Cluster, why_not
from tests.soak.kills import MARK, rank_processes

DEMO = "configs/demo.yaml"
SHORT = ["train.epochs=1", "data.micro_batch_size=16", "data.slots=2", "plan.planner=paper"]
LONG = [
    "train.epochs=1",
    "data.micro_batch_size=8",
    "data.slots=2",
    "plan.planner=paper",
    "plan.replan.every=9 steps",
    "train.checkpoint_every=3 steps",
]

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no Slurm here: {why_not()}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="d2ft-"))
    made = Cluster(folder / "slurm")
    made.start()
    yield made
    made.stop()
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def nothing_left(cluster: Cluster) -> Iterator[None]:
    """A failed test's jobs take no time from the next one's."""
    yield
    cluster.cancel_all()


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    job = cluster.submit("slurm/train.sh", DEMO, *LONG, f"run.folder={folder}")
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    (launch,) = [json.loads(line) for line in (folder / "demo" / "launches.jsonl").read_text().splitlines()]
    of_job = launch["environment"]
    assert (of_job["python"], of_job["torch"]) == (platform.python_version(), version("torch"))
    return folder / "demo"


def assert_same_run(one: Path, other: Path) -> None:
    with h5py.File(one / "results.h5") as first, h5py.File(other / "results.h5") as second:
        for column in ("step", "loss", "learning_rate", "plan"):
            np.testing.assert_array_equal(first["steps"][column], second["steps"][column])
        np.testing.assert_array_equal(first["evaluations"]["loss"], second["evaluations"]["loss"])
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_signal_saves_and_requeues_and_the_losses_are_the_same(
    cluster: Cluster, uninterrupted: Path, tmp_path: Path
) -> None:
    arguments = ["slurm/train.sh", DEMO, *LONG, f"run.folder={tmp_path}"]
    job = cluster.submit(*arguments)
    cluster.wait_for_text(job, "epoch 1")
    cluster.run("scancel", "--signal=USR2", str(job))
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    shown = cluster.output(job)
    assert re.search(r"stopped after \d+ steps by signal USR2 to rank \d on tn1; saved", shown), shown
    assert "unfinished (status 75): back into the queue" in shown
    assert cluster.field(job, "Restarts") == "1"
    assert_same_run(tmp_path / "demo", uninterrupted)

    again = cluster.submit("--ntasks-per-node=1", *arguments)
    assert cluster.wait(again) == "COMPLETED"
    assert "is finished: nothing is left to do" in cluster.output(again)


def test_a_rank_lost_in_its_start_is_repeated_and_a_failure_is_not(cluster: Cluster, tmp_path: Path) -> None:
    lost = cluster.submit(
        "slurm/train.sh",
        DEMO,
        f"run.folder={tmp_path}",
        "launch.timeout_seconds=3",
        environment={MARK: str(tmp_path)},
    )
    cluster.wait(lost, "RUNNING")
    cluster.run("srun", "--nodelist=tn2", "cp", DEMO, "/dev/shm/demo.yaml")
    several = ["--nodelist=tn2,tn3", "--ntasks-per-node=1", "slurm/train-multinode.sh"]
    wrong_key = cluster.submit(*several, DEMO, "train.epohcs=1")
    on_one_node = cluster.submit(*several, "/dev/shm/demo.yaml")

    while not loads_torch(stopped := rank_processes(tmp_path).get(1)):
        assert cluster.state(lost) not in ENDED, cluster.output(lost)
        time.sleep(0.02)
    os.kill(stopped, signal.SIGSTOP)
    for failed, message in ((wrong_key, "train.epohcs: unknown key"), (on_one_node, "/dev/shm/demo.yaml")):
        assert cluster.wait(failed) == "FAILED"
        assert f"failed, not to be repeated: {message}" in cluster.output(failed)
        assert cluster.field(failed, "Restarts") == "0"
    cluster.wait_for_text(lost, "rank 1 on tn1 did not come to a barrier within 3 s")
    cluster.wait_for_text(lost, "back into the queue")


def loads_torch(process: int | None) -> TypeGuard[int]:
    """Whether the process has come to loading torch, which takes it some seconds."""
    return process is not None and "libtorch" in Path(f"/proc/{process}/maps").read_text()


def test_a_lost_node_is_named_and_the_run_goes_on_with_the_ranks_that_remain(
    cluster: Cluster, uninterrupted: Path, tmp_path: Path
) -> None:
    """Two ranks do the work of four: the same batches, whose gradients are summed in another order."""
    run = tmp_path / "demo"
    cluster.run("scontrol", "update", "NodeName=tn[3-4]", "State=DRAIN", "Reason=spared")
    job = cluster.submit(
        "--nodes=1-2", "slurm/train-multinode.sh", DEMO, *LONG, "data.slots=1", f"run.folder={tmp_path}"
    )
    while not complete_checkpoints(run / "checkpoints"):
        assert cluster.state(job) not in ENDED, cluster.output(job)
        time.sleep(0.1)
    cluster.kill_node("tn2")
    cluster.run(
        "scontrol", "update", "NodeName=tn2", "State=DOWN", "Reason=killed"
    )  # else found after SlurmdTimeout
    cluster.wait(job, "PENDING")
    with open_run(run) as lost:
        losses = lost.table("steps")["loss"]
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    cluster.start_node("tn2")
    cluster.run("scontrol", "update", "NodeName=tn[3-4]", "State=RESUME")
    told = re.findall(
        r"\[rank 0 on tn1\] error: rank [23] on tn2 has closed its connection", cluster.output(job)
    )
    assert len(told) == 1
    launches = [json.loads(line) for line in (run / "launches.jsonl").read_text().splitlines()]
    assert [launch["hosts"] for launch in launches] == [["tn1", "tn1", "tn2", "tn2"], ["tn1", "tn1"]]
    saved = int(launches[1]["start"].rpartition("-")[2])
    assert 0 < saved <= len(losses)
    with open_run(run) as changed, open_run(uninterrupted) as whole:
        steps, expected = changed.table("steps"), whole.table("steps")
        np.testing.assert_array_equal(steps["loss"][:saved], losses[:saved])
        np.testing.assert_array_equal(steps["samples"], expected["samples"])
        np.testing.assert_allclose(steps["loss"], expected["loss"], rtol=1e-4)
        evaluations = (opened.table("evaluations")["loss"] for opened in (changed, whole))
        np.testing.assert_allclose(*evaluations, rtol=1e-4)
        assert changed.complete


def test_a_sweep_and_the_analysis_that_waits_for_it(cluster: Cluster, tmp_path: Path) -> None:
    sweep = cluster.submit("slurm/sweep.sh", DEMO, *SHORT, "engine.name=plain", f"run.folder={tmp_path}")
    table = cluster.submit(f"--dependency=afterok:{sweep}", "slurm/analyse.sh", str(tmp_path))
    assert cluster.wait(table) == "COMPLETED", cluster.output(sweep) + cluster.output(table)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "plan.planner-dense" in (tmp_path / "report.html").read_text()
    for point in ("plan.planner-dense", "plan.compute_budget-0.8", "plan.compute_budget-0.6"):
        assert point in cluster.output(table)
        assert open_run(tmp_path / point).complete


def test_scoring_planning_training_as_a_chain(cluster: Cluster, tmp_path: Path) -> None:
    environment = {"CHAIN_FOLDER": str(tmp_path), "PLAN_OPTIONS": "--planner joint --compute-budget 0.5"}
    chain = cluster.submit("slurm/chain.sh", DEMO, *SHORT, f"run.folder={tmp_path}", environment=environment)
    assert cluster.wait(chain) == "COMPLETED", cluster.output(chain)
    jobs = [
        int(number) for number in re.findall(r"(?:scoring|planning|training) (\d+)", cluster.output(chain))
    ]
    assert cluster.wait(jobs[2]) == "COMPLETED", "".join(map(cluster.output, jobs))
    saved = SkipPlan.read(tmp_path / "plan.h5")
    np.testing.assert_array_equal(open_run(tmp_path / "demo").plan(0), saved.operations)


def test_the_other_scripts_as_they_are(cluster: Cluster, tmp_path: Path) -> None:
    # No container program is installable here: a stand-in takes its options and runs the command.
    stand_in = tmp_path / "bin" / "apptainer"
    stand_in.parent.mkdir()
    stand_in.write_text(
        "#!/bin/bash\n[[ $1 == exec && $2 == --nv && $3 == --bind && $5 == --pwd && $7 == *.sif ]] || exit 9\n"
        'cd "$6" && echo "in $7" && exec "${@:8}"\n'
    )
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}:{cluster.environ['PATH']}"
    jobs = [
        cluster.submit("slurm/train-multinode.sh", DEMO, *SHORT, f"run.folder={tmp_path}/nodes"),
        cluster.submit(
            "slurm/train-container.sh", DEMO, *SHORT, f"run.folder={tmp_path}/box", environment={"PATH": path}
        ),
    ]
    folders = ["nodes", "box"]
    if "pipeline_stages" in EngineConfig.model_fields:
        folders.append("stages")
        jobs.append(cluster.submit("slurm/pipeline-tensor.sh", DEMO, *SHORT, f"run.folder={tmp_path}/stages"))
    for job, folder in zip(jobs, folders, strict=True):
        assert cluster.wait(job) == "COMPLETED", cluster.output(job)
        assert open_run(tmp_path / folder / "demo").complete
    assert "in d2ft-hpc.sif" in cluster.output(jobs[1])
    assert open_run(tmp_path / "nodes" / "demo").attributes("environment")["world_size"] == 4


def findings_of(cluster: Cluster, job: int) -> dict[str, Any]:
    """The finding that is not ok, by check."""
    cluster.wait(job)
    lines = [line for line in cluster.output(job).splitlines() if line.startswith("{")]
    assert len(lines) == 1, cluster.output(job)
    answer = json.loads(lines[0])
    assert (cluster.state(job) == "FAILED") == (answer["failed"] > 0), cluster.output(job)
    found = {finding["check"]: finding for finding in answer["findings"] if finding["status"] != "ok"}
    assert all(finding["fix"] for finding in found.values())
    return found


def test_doctor_catches_each_planted_fault(cluster: Cluster, tmp_path: Path) -> None:
    one, script = "--ntasks-per-node=1", ["slurm/doctor.sh", "--json", DEMO]
    wrong_mpi = cluster.submit(*script, f"run.folder={tmp_path}", environment={"SLURM_MPI_TYPE": "none"})
    no_folder = cluster.submit(one, *script, "run.folder=/sys/kernel/runs")
    private = cluster.submit(
        "--nodes=2", one, *script, "run.folder=/dev/shm/runs", "model.weights=/absent.safetensors"
    )
    unlocked = cluster.submit(one, *script, f"run.folder={tmp_path}", environment=refuse_locks(tmp_path))
    found = findings_of(cluster, wrong_mpi)["ranks"]
    assert "a world of 1" in found["text"]
    assert "--mpi=pmi2" in found["fix"]
    assert "cannot write to /sys/kernel/runs" in findings_of(cluster, no_folder)["output"]["text"]
    found = findings_of(cluster, private)
    assert "/dev/shm/runs is not shared" in found["output"]["text"]
    assert "/absent.safetensors" in found["model"]["text"]
    assert "refuses HDF5's locks" in findings_of(cluster, unlocked)["locks"]["text"]


def refuse_locks(folder: Path) -> dict[str, str]:
    """A file system that refuses locks, to every program that is started with these variables."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler to make a file system that refuses locks")
    source, library = folder / "locks.c", folder / "locks.so"
    source.write_text("#include <errno.h>\nint flock(int f, int o) { errno = ENOLCK; return -1; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return {"LD_PRELOAD": str(library)}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_the_scripts_are_clean() -> None:
    scripts = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "slurm").glob("*.sh"))
    checked = subprocess.run(["shellcheck", "-x", *scripts], cwd=REPOSITORY, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
