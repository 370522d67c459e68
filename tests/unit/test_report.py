"""The report against numbers worked out by hand, its picture, and the analysis scripts run as users do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from d2ft_hpc.errors import ResultsError
from d2ft_hpc.report import report, summarize
from d2ft_hpc.results import ResultsWriter

ROOT = Path(__file__).parents[2]


def make_run(path, share, steps=40):
    """Two ranks; rank 1 executes 20 % of the dense FLOPs less and takes 0.1 s longer than rank 0."""
    operations = np.full((4, 3, 2), 2, np.uint8)
    if share < 1:
        operations[:2, 0] = [0, 1]  # block 0: head 0 SHORTCUT, head 1 FORWARD_ONLY in half of the rows
    with ResultsWriter(path) as writer:
        writer.put("plans/0", {"operations": operations}, {"solve_seconds": 0.5, "first_step": 0})
        scores = np.ones((4, 3, 2), np.float32)
        writer.put("scores/0", {"forward": scores, "backward": scores}, {"step": 0, "seconds": 1.5})
        for step in range(steps):
            writer.append(
                "steps",
                {
                    "step": step,
                    "plan": 0,
                    "loss": 2.0 / (step + 1),
                    "dense_flops": [10.0, 10.0],
                    "planned_flops": [10 * share, 10 * share],
                    "executed_flops": [10 * share, 10 * share - 2],
                    "bytes_sent": [1e6, 3e6],
                    "step_seconds": [share, share + 0.1],
                },
            )
            if step % 10 == 9:
                writer.append("evaluations", {"step": step, "accuracy": step / 100})
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / name / "results.h5", share) for name, share in (("dense", 1.0), ("d2ft", 0.6))]


def test_numbers(runs):
    run = summarize(runs[1], "d2ft")
    assert run.accuracy == pytest.approx(0.39)
    assert run.planned_compute == pytest.approx(0.6)
    assert run.measured_compute == pytest.approx(0.5)
    assert run.train_seconds == pytest.approx(40 * 0.7)  # the slower rank
    assert run.preparation_seconds == pytest.approx(2.0)
    assert run.bytes_per_rank_step == pytest.approx(2e6)
    assert run.bytes_total == pytest.approx(160e6)
    assert run.workload_variance == pytest.approx(0.01)  # shares 0.6 and 0.4
    assert run.evaluation_seconds.tolist() == pytest.approx([2 + 7 * k for k in (1, 2, 3, 4)])
    assert run.full_share is not None
    assert run.full_share.tolist() == [[0.5, 0.5], [1, 1], [1, 1]]


def test_table(runs):
    lines = report([path.parent for path in runs], None).splitlines()
    dense, d2ft = (next(line for line in lines if line.startswith(name)) for name in ("dense", "d2ft"))
    assert dense.split() == [
        "dense",
        "39.00",
        "100.0",
        "90.0",
        "44.0",
        "1.000",
        "2.000",
        "160.0",
        "1.00e-02",
        "2.00",
    ]
    assert d2ft.split() == [
        "d2ft",
        "39.00",
        "60.0",
        "50.0",
        "28.0",
        "0.636",
        "2.000",
        "160.0",
        "1.00e-02",
        "2.00",
    ]
    assert len({len(line) for line in (lines[1], lines[2], dense, d2ft)}) <= 2  # aligned right
    assert lines[lines.index(d2ft) + 1].strip() == str(runs[1])


def test_picture(runs, tmp_path):
    report(runs, tmp_path / "new" / "report.png")
    pixels = imread(tmp_path / "new" / "report.png")
    assert pixels.shape[0] > 800
    assert pixels.shape[1] > 1000
    assert 0.02 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.9  # neither blank nor solid
    with pytest.raises(ResultsError, match="cannot write the picture"):
        report(runs, runs[0] / "report.png")


def test_runs_that_recorded_next_to_nothing(tmp_path):
    paths = []
    for name in ("a", "b"):
        with ResultsWriter(tmp_path / name / "same" / "results.h5") as writer:
            writer.append("steps", {"step": 0})
        paths.append(writer.path)
    open_run = ResultsWriter(tmp_path / "c" / "results.h5")
    open_run.flush()
    text = report([*paths, open_run.path], tmp_path / "report.png")
    assert os.path.join("a", "same") in text
    assert os.path.join("b", "same") in text
    assert "did not end in order" in text
    assert (tmp_path / "report.png").exists()


def test_no_runs_and_no_file():
    with pytest.raises(ResultsError, match="no runs"):
        report([], None)
    with pytest.raises(ResultsError, match="no results file"):
        report([Path("absent")], None)


def analyse(script, *arguments, folder):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "analysis" / script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": path}
    )


def test_plan_heatmap(runs, tmp_path):
    done = analyse("plan_heatmap.py", runs[1], "--json", "--plan", 0, "--png", "p.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    share = json.loads(done.stdout)["share"]
    assert share["FULL"] == [[0.5, 0.5], [1, 1], [1, 1]]
    assert share["SHORTCUT"][0] == [0.5, 0]
    assert share["FORWARD_ONLY"][0] == [0, 0.5]
    assert imread(tmp_path / "p.png").shape[0] > 300
    done = analyse("plan_heatmap.py", runs[1], "--plan", 7, folder=tmp_path)
    assert (done.returncode, done.stderr) == (1, f"{runs[1]} has no plan 7\n")


def test_loss_curves(runs, tmp_path):
    done = analyse("loss_curves.py", *runs, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert imread(tmp_path / "loss_curves.png").shape[0] > 300
    done = analyse("loss_curves.py", runs[1], "--json", "--smooth", 1, folder=tmp_path)
    (curve,) = json.loads(done.stdout)
    assert curve["loss"] == [2.0 / (step + 1) for step in range(40)]
    assert curve["accuracy_seconds"] == pytest.approx([9, 16, 23, 30])
    done = analyse("loss_curves.py", "absent", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("no results file at absent")


@pytest.mark.parametrize("script", ["plan_heatmap.py", "loss_curves.py"])
def test_help(script, tmp_path):
    done = analyse(script, "--help", folder=tmp_path)
    assert done.returncode == 0
    assert "--json" in done.stdout
