"""The examples, started as their first lines say; that with Accelerate must leave no process group's threads behind."""

from __future__ import annotations

import itertools
import re
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

from d2ft_hpc import results
from tests.distributed.launching import REPOSITORY, run_command

EXAMPLES = REPOSITORY / "tests" / "examples"
RUN = Path(__file__).with_name("run_example.py")
BESIDE = Path(sys.executable).parent
COMMANDS = {
    "own_loop.py": [sys.executable],
    "own_loop.py on 2 ranks": [str(BESIDE / "torchrun"), "--nproc_per_node=2", "--standalone"],
    "heads_loop.py": [sys.executable],
    "accelerate_fsdp2.py": [str(BESIDE / "torchrun"), "--nproc_per_node=2", "--standalone", str(RUN)],
    "transformers_trainer.py": [sys.executable],
    "transformers_trainer.py on 2 ranks": [str(BESIDE / "torchrun"), "--nproc_per_node=2", "--standalone"],
    "decoder_trainer.py": [sys.executable],
    "decoder_trainer.py on 2 ranks": [str(BESIDE / "torchrun"), "--nproc_per_node=2", "--standalone"],
    "lightning_loop.py": [sys.executable],
    "lightning_loop.py on 2 ranks": [str(BESIDE / "torchrun"), "--nproc_per_node=2", "--standalone"],
    "deepspeed_script.py": [str(BESIDE / "deepspeed"), "--num_gpus", "2", "--master_port", "29651"],
}


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
def shown(folder: Path) -> dict[str, str]:
    """What each example printed; all run at once."""

    pytest.importorskip("accelerate")

    def start(name: str) -> str:
        (folder / name).mkdir()
        job = run_command([*COMMANDS[name], str(EXAMPLES / name.split()[0])], cwd=folder / name)
        assert job.returncode == 0, (
            name + job.stdout + job.stderr + (upstream() if "accelerate" in name else "")
        )
        return job.stdout

    is_known = Version(version("transformers")) >= Version("5.24")  # whose decoders are
    names = [name for name in COMMANDS if is_known or "decoder" not in name]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(start, names), strict=True))


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {name.split()[0] for name in COMMANDS}


def test_examples_train(shown: dict[str, str]) -> None:
    for name, text in shown.items():
        losses = [float(value) for value in re.findall(r"loss (\d+\.\d+)", text)]
        assert len(losses) == (6 if "own_loop" in name else 3), name + text
        assert all(0.5 < loss < 10 for loss in losses), name
    for name in shown.keys() - {"own_loop.py", "own_loop.py on 2 ranks"}:  # one plan, after a resumption too
        (share,) = re.findall(r"(\d+\.\d)% of the dense compute, made", shown[name])
        assert 55 < float(share) <= 60, name
    for name in ("own_loop.py", "own_loop.py on 2 ranks"):
        shares = re.findall(r"promised (\S+)% .* measured (\S+)%", shown[name])
        assert all(promised == measured for promised, measured in shares), name
        assert 40 < sum(float(promised) for promised, _ in shares) / 6 <= 60, name


@pytest.mark.parametrize(("name", "ranks"), [("heads_loop", 1), ("accelerate_fsdp2", 2)])
def test_examples_leave_a_record(shown: dict[str, str], folder: Path, name: str, ranks: int) -> None:
    with results.open(folder / f"{name}.py" / "runs" / name) as run:
        steps = run.table("steps")
        assert run.complete
        assert steps["executed_flops"].shape == (3, ranks)
        np.testing.assert_allclose(steps["executed_flops"][1:], steps["planned_flops"][1:], rtol=1e-9)


def test_the_readme_s_own_loop_is_the_example() -> None:
    readme = (REPOSITORY / "README.md").read_text().split("## In your own loop\n")[1]
    lines = itertools.takewhile(lambda line: not line.strip() or line.startswith("    "), readme.splitlines())
    script = (EXAMPLES / "own_loop.py").read_text().split('"""\n')[1]
    assert textwrap.dedent("\n".join(lines)).strip() == script.strip()


def test_d2ft_adds_five_lines_at_most_to_a_loop() -> None:
    for name in ("own_loop.py", "heads_loop.py"):
        script = (EXAMPLES / name).read_text().split('"""\n')[1]
        assert sum("d2ft" in line and "checkpoint" not in line for line in script.splitlines()) <= 5, name
