"""The examples, started as their first lines say. The one with Accelerate must leave no threads of a process group."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

from d2ft_hpc import results
from tests.distributed.launching import REPOSITORY, free_port, run_command

EXAMPLES = REPOSITORY / "tests" / "examples"
RUN = Path(__file__).with_name("run_example.py")
BESIDE = Path(sys.executable).parent
COMMANDS = {
    "command_line.sh": ["bash"],
    "first_loop.py": [sys.executable],
    "own_loop.py on 2 ranks": [str(BESIDE / "torchrun"), "--nproc_per_node=2", "--standalone"],
    "heads_loop.py": [sys.executable],
    "accelerate_fsdp2.py": [str(BESIDE / "torchrun"), "--nproc_per_node=2", "--standalone", str(RUN)],
    "accelerate_fsdp2.py on FSDP2": [
        str(BESIDE / "torchrun"),
        "--nproc_per_node=2",
        "--standalone",
        str(RUN.with_name("run_on_fsdp2.py")),
    ],
    "transformers_trainer.py": [sys.executable],
    "transformers_trainer.py on 2 ranks": [str(BESIDE / "torchrun"), "--nproc_per_node=2", "--standalone"],
    "decoder_trainer.py": [sys.executable],
    "decoder_trainer.py on 2 ranks": [str(BESIDE / "torchrun"), "--nproc_per_node=2", "--standalone"],
    "text_loop.py": [sys.executable],
    "text_loop.py on 2 ranks": [str(BESIDE / "torchrun"), "--nproc_per_node=2", "--standalone"],
    "lightning_loop.py": [sys.executable],
    "lightning_loop.py on 2 ranks": [str(BESIDE / "torchrun"), "--nproc_per_node=2", "--standalone"],
    "deepspeed_script.py": [str(BESIDE / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}"],
}
DECODERS = ("decoder_trainer.py", "text_loop.py")
QUICK = ("own_loop.py on 2 ranks",)
"""Those that `make test` runs."""


def upstream() -> str:
    """Whether Accelerate without this project ends as badly."""
    command = [*COMMANDS["accelerate_fsdp2.py"], str(RUN.with_name("accelerate_alone.py"))]
    statuses = [run_command(command).returncode for _ in range(6)]
    return f"\nAccelerate alone ended with {statuses}" + (": the fault is upstream" if any(statuses) else "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In which each runs in one of its own."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def shown_quick(folder: Path) -> dict[str, str]:
    """What each of the quick examples printed."""
    return run_at_once(QUICK, folder)


@pytest.fixture(scope="module")
def shown(folder: Path) -> dict[str, str]:
    """What each of the others printed."""
    pytest.importorskip("accelerate")
    left_out = {*QUICK}
    if Version(version("transformers")) < Version("5.24"):
        # Its decoders are known from there on; before, the Trainer resumed on several GPUs, but not on CPUs.
        left_out |= {name for name in COMMANDS if name.startswith((*DECODERS, "transformers_trainer.py on"))}
    return run_at_once([name for name in COMMANDS if name not in left_out], folder)


def run_at_once(names: Sequence[str], folder: Path) -> dict[str, str]:
    def start(name: str) -> str:
        (folder / name).mkdir()
        (folder / name / "configs").symlink_to(REPOSITORY / "configs")
        path = os.pathsep.join((str(BESIDE), os.environ["PATH"]))
        job = run_command([*COMMANDS[name], str(EXAMPLES / name.split()[0])], cwd=folder / name, PATH=path)
        assert job.returncode == 0, (
            name + job.stdout + job.stderr + (upstream() if "accelerate" in name else "")
        )
        return job.stdout

    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(start, names), strict=True))


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        name.split()[0] for name in COMMANDS
    }


GROWING = ("first_loop.py", "own_loop.py on 2 ranks", "deepspeed_script.py")
"""Their images grow over the six steps; the other loops plan by heads for three steps."""


def test_one_example_trains(shown_quick: dict[str, str]) -> None:
    assert_trained(shown_quick)


@pytest.mark.full
def test_the_other_examples_train(shown: dict[str, str]) -> None:
    assert_trained(shown)


def assert_trained(shown: dict[str, str]) -> None:
    for name in shown.keys() - {"command_line.sh"}:
        text = shown[name]
        losses = [float(value) for value in re.findall(r"loss (\d+\.\d+)", text)]
        assert len(losses) == (6 if name in GROWING else 3), name + text
        assert all(0.5 < loss < 10 for loss in losses), name
    for name in shown.keys() - {"command_line.sh", *GROWING}:  # one plan, after a resumption too
        (share,) = re.findall(r"(\d+\.\d)% of a dense step's compute, made", shown[name])
        assert 55 < float(share) <= 60, name
    for name in shown.keys() & {"first_loop.py", "own_loop.py on 2 ranks"}:
        shares = re.findall(
            r"6 steps so far: promised (\S+)% .* measured (\S+)%; (\S+)% in all 6", shown[name]
        )
        assert len({*shares[0]}) == 1, name
        assert 40 < float(shares[0][0]) <= 60, name
        assert "came: images have full size" not in shown[name], name
    if "accelerate_fsdp2.py" in shown:
        kinds, losses = zip(
            *(
                (re.findall(r"training a (\w+)", text), re.findall(r"loss (\S+)", text))
                for text in (shown["accelerate_fsdp2.py"], shown["accelerate_fsdp2.py on FSDP2"])
            ),
            strict=True,
        )
        assert kinds == (["DistributedDataParallel"], ["FSDPVisionTransformer"])
        assert losses[0] == losses[1]  # whatever spreads the weights
    for name in shown.keys() & {"deepspeed_script.py"}:
        (share,) = re.findall(r"(\d+\.\d)% of what full size takes in these", shown[name])
        assert 55 < float(share) <= 60


@pytest.mark.full
def test_the_command_line_s_report_has_the_compute_that_was_asked_for(shown: dict[str, str]) -> None:
    (row,) = re.findall(r"^half .*$", shown["command_line.sh"], re.MULTILINE)
    planned, measured = map(float, row.split()[2:4])
    assert planned == measured
    assert 45 < measured <= 50


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "ranks"), [("heads_loop.py", 1), ("accelerate_fsdp2.py", 2), ("accelerate_fsdp2.py on FSDP2", 2)]
)
def test_examples_leave_a_record(shown: dict[str, str], folder: Path, name: str, ranks: int) -> None:
    with results.open(folder / name / "runs" / name.split(".")[0]) as run:
        steps = run.table("steps")
        assert run.complete
        assert steps["executed_flops"].shape == (3, ranks)
        np.testing.assert_allclose(steps["executed_flops"][1:], steps["planned_flops"][1:], rtol=1e-9)


def test_d2ft_adds_five_lines_at_most_to_a_loop() -> None:
    for name in ("first_loop.py", "own_loop.py", "heads_loop.py", "text_loop.py"):
        script = (EXAMPLES / name).read_text().split('"""\n')[1]
        assert sum("d2ft" in line and "checkpoint" not in line for line in script.splitlines()) <= 5, name
