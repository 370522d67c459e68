"""The examples, started as their first lines say; that with Accelerate must leave no process group's threads behind."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.distributed.launching import REPOSITORY, run_command

EXAMPLES = REPOSITORY / "tests" / "examples"
RUN = Path(__file__).with_name("run_example.py")
BESIDE = Path(sys.executable).parent
COMMANDS = {
    "plain_loop.py": [sys.executable],
    "accelerate_fsdp2.py": [str(BESIDE / "torchrun"), "--nproc_per_node=2", "--standalone", str(RUN)],
    "deepspeed_script.py": [str(BESIDE / "deepspeed"), "--num_gpus", "2", "--master_port", "29651"],
}


def upstream() -> str:
    """Whether Accelerate without this project ends as badly."""
    command = [*COMMANDS["accelerate_fsdp2.py"], str(RUN.with_name("accelerate_alone.py"))]
    statuses = [run_command(command).returncode for _ in range(6)]
    return f"\nAccelerate alone ended with {statuses}" + (": the fault is upstream" if any(statuses) else "")


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    """What each example printed; all run at once."""

    pytest.importorskip("accelerate")

    def start(name: str) -> str:
        job = run_command([*COMMANDS[name], str(EXAMPLES / name)])
        assert job.returncode == 0, (
            name + job.stdout + job.stderr + (upstream() if "accelerate" in name else "")
        )
        return job.stdout

    with ThreadPoolExecutor() as pool:
        return dict(zip(COMMANDS, pool.map(start, COMMANDS), strict=True))


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(COMMANDS)


def test_examples_train(shown: dict[str, str]) -> None:
    for name, text in shown.items():
        losses = [float(value) for value in re.findall(r"loss (\d+\.\d+)", text)]
        assert len(losses) == 3, name + text
        assert all(0.5 < loss < 10 for loss in losses), name
    assert "60% of the dense compute" in shown["plain_loop.py"]
    (share,) = re.findall(r"(\d+\.\d)% of the dense compute", shown["deepspeed_script.py"])
    assert 55 < float(share) <= 60
