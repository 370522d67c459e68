"""Figures and report against numbers worked out by hand, and the commands run as users do."""

import base64
import html
import json
import os
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest
from matplotlib.image import imread

from d2ft_hpc.cli import main
from d2ft_hpc.errors import ResultsError
from d2ft_hpc.figures import (
    classes,
    compare,
    free_shapes,
    gantt,
    learning,
    paper,
    pareto,
    plans,
    predicted,
    scores,
    sufficient,
    summary,
    workload,
)
from d2ft_hpc.figures.command import FIGURES
from d2ft_hpc.figures.run import open_runs
from d2ft_hpc.report import report
from d2ft_hpc.results import ResultsWriter


def config(share, seed, engine="{}", steps_share=None):
    train = "" if steps_share is None else f"train: {{steps_share: {steps_share}}}\n"
    return train + (
        f"run: {{name: x, seed: {seed}}}\nmodel: {{name: vit}}\ndata: {{name: cifar10, micro_batch_size: 2}}\n"
        f"plan: {{compute_budget: {share}}}\nengine: {engine}\n"
    )


def make_run(
    path,
    share,
    steps=40,
    seed=0,
    lost=0.0,
    shapes=None,
    dense_pass_seconds=None,
    device="cpu",
    engine="{}",
    steps_share=None,
):
    """Two ranks; rank 1 executes 20 % of the dense FLOPs less and takes 0.1 s longer than rank 0, which waits."""
    operations = np.full((4, 3, 2), 2, np.uint8)
    if share < 1:
        operations[:2, 0] = [0, 1]  # block 0: head 0 SHORTCUT, head 1 FORWARD_ONLY in half of the rows
    with ResultsWriter(path) as writer:
        writer.put("config", {"yaml": config(share, seed, engine, steps_share)})
        writer.put("environment", {}, {"device": device})
        values = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
        writer.append("scores", {"step": 0, "forward": values, "backward": values, "seconds": 1.5})
        writer.append("plans", {"step": 0, "operations": operations, "solve_seconds": 0.5, **(shapes or {})})
        if dense_pass_seconds is not None:  # of 2 samples with 4 + 6 * 1 FLOP each
            sizes = {"always_flops": 4.0, "full_flops": 1.0, "num_blocks": 3, "num_heads": 2}
            writer.put("model", {}, {**sizes, "dense_pass_seconds": dense_pass_seconds})
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
                    "bytes_sent": [1e6 * share, 3e6 * share],
                    "planned_bytes": [1e6 * share, 2e6 * share],
                    "dense_bytes": [2e6, 2e6],
                    "forward_seconds": [share - 0.1, share],
                    "backward_seconds": [0.1, 0.1],
                    "communication_seconds": [0.2, 0.1],
                    "waiting_seconds": [0.1, 0.0],
                    "step_seconds": [share, share + 0.1],
                },
            )
            if step % 10 == 9:
                row = {"step": step + 1, "accuracy": step / 100 - lost, "class_accuracy": [0.5, 0.25]}
                writer.append("evaluations", {**row, "confusion": [[2, 2], [3, 1]]})
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / name / "results.h5", share) for name, share in (("dense", 1.0), ("d2ft", 0.6))]


@pytest.fixture
def runs(paths):
    with open_runs(paths) as runs:
        yield runs


def test_summary(runs):
    _, d2ft = summary.measure(runs)["runs"]
    expected = {
        "accuracy": 0.39,
        "planned_compute": 0.6,
        "measured_compute": 0.5,
        "train_seconds": 40 * 0.7,  # the slower rank
        "preparation_seconds": 2.0,
        "bytes_per_rank_step": 1.2e6,
        "bytes_total": 96e6,
        "workload_variance": 0.01,  # shares 0.6 and 0.4
        "waiting_share": 0.1 / 1.3,
    }
    assert {name: d2ft[name] for name in expected} == pytest.approx(expected)


ENGINES = {
    "ddp": ("{name: ddp}", "the plan changes no bytes between replicas: DDP reduces every gradient"),
    "zero2": (
        "{deepspeed: {zero_optimization: {stage: 2}}}",
        "the plan changes no bytes between replicas: ZeRO 2 reduces every gradient",
    ),
    "bf16": (
        "{precision: bf16}",
        "the plan changes no bytes between replicas: DeepSpeed in bf16 reduces every gradient",
    ),
    # 40 steps of two ranks send 0.6 and 1.8 MB each, dense ones 2 MB.
    "fsdp2": (
        "{name: fsdp2}",
        "sent 64.0 MB less than dense: FSDP2 does not gather a block that no replica runs",
    ),
    "zero0": ("{}", ""),
    "other version": ("{name: of later days}", ""),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_plan_changes_between_replicas_is_said(tmp_path, engine):
    section, said = ENGINES[engine]
    sparse = make_run(tmp_path / "sparse" / "results.h5", 0.6, engine=section)
    dense = make_run(tmp_path / "dense" / "results.h5", 1.0, engine=section)
    text = report([dense, sparse])
    if said:
        assert f"sparse: {said}" in text
    assert ("sparse: " in text) == bool(said)
    assert "\ndense: " not in text


def test_a_plan_under_which_every_block_is_gathered_saves_no_bytes(tmp_path):
    run = make_run(tmp_path / "run" / "results.h5", 0.6, engine="{name: fsdp2}")
    with h5py.File(run, "r+") as file:
        file["steps/bytes_sent"][:] = file["steps/dense_bytes"][:]
    assert "the plan changes no bytes between replicas: FSDP2 gathered every block" in report([run])


def test_runs_that_take_a_share_of_the_steps_say_so(tmp_path):
    """A dense run of 0.6 of the steps takes 0.6 of the dense compute."""
    runs = [
        make_run(tmp_path / name / "results.h5", 1.0, steps_share=share)
        for name, share in (("older", None), ("standard", 1.0), ("fewer_steps", 0.6))
    ]
    said = "fewer_steps: takes 60.0 % of its epochs' steps (train.steps_share); % of dense is of all of them"
    page = tmp_path / "report.html"
    lines = report(runs, page=page).splitlines()
    assert [line for line in lines if "steps_share" in line] == [said]
    with open_runs(runs) as opened:
        numbers = summary.measure(opened)["runs"]
    shares = ("planned_compute", "measured_compute", "planned_bytes", "measured_bytes")
    for share in shares:
        assert numbers[2][share] == pytest.approx(0.6 * numbers[1][share]), share
    assert f"<p>{html.escape(said)}.</p>" in page.read_text()


def test_what_makes_times_unlike_is_said_in_one_line(tmp_path):
    plain, compiled = "{name: ddp, compile: false}", "{name: ddp, compile: true, device: cpu}"
    dense = make_run(tmp_path / "dense" / "results.h5", 1.0, engine=plain)
    like = make_run(tmp_path / "like" / "results.h5", 0.6, seed=1, engine=plain)
    unlike = make_run(tmp_path / "unlike" / "results.h5", 0.6, engine=compiled, device="H200")
    unlike_in = "device (cpu, H200), engine.compile (False, True)"
    said = f"times are of unlike runs, which differ not only in their plans: {unlike_in}"
    page = tmp_path / "report.html"
    lines = report([dense, unlike], page=page).splitlines()
    assert [line for line in lines if "unlike runs" in line] == [said]
    assert f"<p>{html.escape(said)}.</p>" in page.read_text()
    assert "unlike runs" not in report([dense, like])


def test_loops_of_their_own_on_unlike_ranks_are_told_too(tmp_path):
    runs = []
    for name, ranks in (("one", 1), ("two", 2)):
        runs.append(tmp_path / name / "results.h5")
        with ResultsWriter(runs[-1]) as writer:
            writer.put(
                "config", {"yaml": f"compute_budget: 0.6\ncompile: {ranks > 1}\nreplan: {{every: null}}\n"}
            )
            row = {
                "dense_flops": [1.0] * ranks,
                "step_seconds": [1.0] * ranks,
                "planned_flops": [1.0] * ranks,
            }
            writer.append("steps", {"step": 0, "plan": -1, **row})
    assert "in their plans: ranks (1, 2), compile (False, True)" in report(runs)


def test_that_measured_compute_has_recomputed_activations_is_said(tmp_path):
    engine = "{name: ddp, activation_checkpointing: true}"
    runs = [
        make_run(tmp_path / "plain" / "results.h5", 1.0, engine="{name: ddp}"),
        make_run(tmp_path / "recomputes" / "results.h5", 1.0, engine=engine),
    ]
    said = [line for line in report(runs).splitlines() if "recomputed" in line]
    assert len(said) == 1
    assert said[0].startswith(
        "recomputes: measured compute has the activations that are recomputed (activation checkpointing)"
    )


def test_learning(runs):
    _, d2ft = learning.measure(runs, smooth=1)["runs"]
    assert d2ft["loss"].tolist() == [2.0 / (step + 1) for step in range(40)]
    assert d2ft["loss_seconds"][:2].tolist() == pytest.approx([2.7, 3.4])
    assert d2ft["accuracy_seconds"].tolist() == pytest.approx([2 + 7 * k for k in (1, 2, 3, 4)])


def test_pareto_finds_the_dense_run_of_equal_compute(paths, tmp_path):
    numbers = {}
    for name, steps in (("without", 10), ("with", 22)):
        short = make_run(tmp_path / name / "results.h5", 1.0, steps=steps)
        with open_runs([*paths, short]) as runs:
            (numbers[name],) = pareto.measure(runs)["rivals"]
    # 40 steps at 10 of 20 FLOP are 400; dense steps take 18
    assert numbers["without"]["dense_of_equal_compute"] is None
    assert numbers["with"]["dense_of_equal_compute"] == "with"
    assert numbers["with"]["its_accuracy"] == pytest.approx(0.19)
    # 400 / 18 = 22.2 steps: between 0.19 after 20 steps and 0.29 after 30
    assert numbers["with"]["dense_on_its_way"] == pytest.approx(0.19 + 0.1 * (400 / 18 - 20) / 10)


def test_pareto_shows_the_best_that_a_dense_run_had_reached(paths):
    with open_runs(paths) as runs:
        numbers = pareto.measure(runs)
    numbers["runs"][0]["on_the_way"]["accuracy"][1] = 0.6  # both end at 0.39
    bottom, top = pareto.draw(numbers).axes[0].get_ylim()
    assert bottom < 39 < 60 < top


def test_workload_and_gantt(runs):
    _, d2ft = workload.measure(runs)["runs"]
    assert d2ft["compute"].tolist() == pytest.approx([0.6, 0.4])
    assert d2ft["seconds"]["waiting"].tolist() == pytest.approx([0.1, 0])
    assert d2ft["seconds"]["communication"].tolist() == pytest.approx([0.1, 0.1])  # waiting apart
    _, d2ft = gantt.measure(runs, first=5, steps=3)["runs"]
    assert d2ft["steps"].tolist() == [5, 6, 7]
    assert d2ft["seconds"]["forward"][0].tolist() == pytest.approx([0.5, 0.6])
    with pytest.raises(ResultsError, match="has no step 99"):
        gantt.measure(runs, first=99)


def test_plans(runs):
    _, d2ft = plans.measure(runs)["runs"]
    assert d2ft["share"]["FULL"].tolist() == [[0.5, 0.5], [1, 1], [1, 1]]
    assert d2ft["share"]["SHORTCUT"].tolist()[0] == [0.5, 0]
    assert d2ft["share"]["FORWARD_ONLY"].tolist()[0] == [0, 0.5]
    assert d2ft["full_by_plan"][0].tolist() == [0.5, 1, 1]
    assert d2ft["full_by_row"].tolist() == [[0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]
    with pytest.raises(ResultsError, match="has no plan 7"):
        plans.measure(runs, plan=7)


def test_plans_that_scale_images_show_their_sizes_over_the_steps(tmp_path):
    with ResultsWriter(tmp_path / "tokens" / "results.h5") as writer:
        for step, side in ((0, 4), (6, 8)):
            plan = {"operations": np.full((4, 3, 2), 2, np.uint8), "grids": np.full((4, 2), side)}
            writer.append("plans", {"step": step, **plan})
        for step in range(10):
            writer.append("steps", {"step": step, "plan": step // 6})
    with open_runs([writer.path]) as runs:
        numbers, second = plans.measure(runs), plans.measure(runs, plan=1)
    (tokens,) = numbers["runs"]
    assert (tokens["grids"], tokens["end"], tokens["skips"]) == ([[[4, 4]], [[8, 8]]], 10, False)
    assert second["runs"][0]["grids"] == [[[8, 8]]]
    (axis,) = plans.draw(numbers).axes  # no heads are skipped, so nothing is drawn of them
    assert [label.get_text() for label in axis.get_yticklabels()] == ["4 x 4", "8 x 8"]
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]
    assert drawn == [([0, 6], [16, 16]), ([6, 10], [64, 64])]


def test_classes_have_their_names(paths, tmp_path):
    named = make_run(tmp_path / "named" / "results.h5", 1.0)
    with h5py.File(named, "r+") as file:
        file["model/class_name"] = np.array([b"cat", b"dog"])
    with open_runs([named, paths[0]]) as runs:
        figure = classes.draw(classes.measure(runs))
    told = [[label.get_text() for label in axis.get_xticklabels()] for axis in figure.axes[:4]]
    assert told == [["cat", "dog"], ["cat", "dog"], ["0", "1"], ["0", "1"]]
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["cat", "dog"]


def test_predicted(runs):
    numbers = predicted.measure(runs)
    assert numbers["baseline"] == "dense"
    _, d2ft = numbers["runs"]
    assert (d2ft["planned"], d2ft["executed"]) == (pytest.approx([0.6]), pytest.approx([0.5]))
    assert d2ft["predicted_time"] == pytest.approx([0.6])
    assert d2ft["measured_time"] == pytest.approx([0.7 / 1.1])


def test_scores(runs):
    _, d2ft = scores.measure(runs)["runs"]
    assert d2ft["forward"].tolist() == [[9, 10], [11, 12], [13, 14]]


def test_comparison_over_seeds(tmp_path):
    """Against scipy's own tests on the accuracies: paired where both groups have the same seeds."""
    from scipy.stats import ttest_ind, ttest_rel

    lost = {1.0: [0.0, 0.01, 0.02], 0.6: [0.05, 0.055, 0.09]}
    paths = [
        make_run(tmp_path / f"{share}-{seed}" / "results.h5", share, seed=seed, lost=values[seed])
        for share, values in lost.items()
        for seed in range(3)
    ]
    with open_runs(paths) as runs:
        dense, d2ft = compare.measure(runs)["groups"]
        beside = paper.measure(runs)["runs"]
    assert (dense["label"], d2ft["label"]) == ("compute_budget=1.0", "compute_budget=0.6")
    assert d2ft["seeds"] == [0, 1, 2]
    accuracies = [[0.39 - each for each in values] for values in lost.values()]
    assert d2ft["accuracy"]["difference"] == pytest.approx(np.mean(accuracies[1]) - np.mean(accuracies[0]))
    expected = ttest_rel(*reversed(accuracies))
    assert (d2ft["test"], d2ft["accuracy"]["p"]) == ("paired", pytest.approx(expected.pvalue))
    low, high = (
        d2ft["accuracy"]["difference"] + sign * d2ft["accuracy"]["difference_half_interval"]
        for sign in (-1, 1)
    )
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    with open_runs([paths[2], paths[0], paths[1], *paths[3:]]) as runs:  # in another order
        assert compare.measure(runs)["groups"][1]["accuracy"]["p"] == pytest.approx(expected.pvalue)
    with open_runs(paths[:-1]) as runs:
        _, d2ft = compare.measure(runs)["groups"]
    expected = ttest_ind(accuracies[0], accuracies[1][:-1], equal_var=False)
    assert (d2ft["test"], d2ft["accuracy"]["p"]) == ("Welch", pytest.approx(expected.pvalue))
    assert [run["drop"] for run in beside] == pytest.approx([4, 4.5, 8])
    assert beside[0]["compute_saved"] == pytest.approx(0.5)
    assert beside[0]["communication_saved"] == pytest.approx(0.4)


def test_table(paths):
    lines = report([path.parent for path in paths]).splitlines()
    dense, d2ft = (next(line for line in lines if line.startswith(name)) for name in ("dense", "d2ft"))
    expected = "39.00 100.0 90.0 44.0 100.0 2.000 160.0 75.0 100.0 1.00e-02 4.8 2.00"
    assert dense.split() == ["dense", *expected.split()]
    expected = "39.00 60.0 50.0 28.0 63.6 1.200 96.0 45.0 60.0 1.00e-02 7.7 2.00"
    assert d2ft.split() == ["d2ft", *expected.split()]
    assert lines[lines.index(d2ft) + 1].strip() == str(paths[1])


FREE = (
    "free: blocks that skip heads ran eagerly; their 20 shapes are too many for engine.compile (at most 8). "
    "A step took 1.06 times the ideal, 60.0% of the step of dense."
)


def test_free_shapes(paths, tmp_path):
    """20 shapes where 8 are compiled: steps of 0.7 s against 0.6 of the dense 1.1 s, of the rank that computes most."""
    free = {"block_shapes": 20, "micro_batch_shapes": 20, "most_shapes": 8}
    path = make_run(tmp_path / "free" / "results.h5", 0.6, shapes=free)
    with open_runs([*paths, path]) as runs:
        (found,) = free_shapes.measure(runs)["runs"]  # the others say nothing of their shapes: older files
    assert (found["block_shapes"], found["dense"]) == (20, "dense")
    assert found["executed_share"] == pytest.approx(0.6)
    assert found["seconds_over_ideal"] == pytest.approx(0.7 / (0.6 * 1.1))
    text = report([paths[0], path])
    assert FREE in text.splitlines()
    assert "CUDA graphs" not in text


def test_cuda_graphs_that_free_shapes_cost(paths, tmp_path):
    shapes = {"block_shapes": 0, "micro_batch_shapes": 20, "most_shapes": 8}
    on_cpu = make_run(tmp_path / "on_cpu" / "results.h5", 0.6, shapes=shapes)
    on_gpu = make_run(tmp_path / "on_gpu" / "results.h5", 0.6, shapes=shapes, device="NVIDIA H200")
    *_, line = report([paths[0], on_cpu, on_gpu]).splitlines()
    assert line == (
        "on_gpu: micro-batches ran without CUDA graphs; their 20 shapes are too many for engine.cuda_graphs (at most "
        "8). A step took 1.06 times the ideal, 60.0% of the step of dense."
    )


def test_free_shapes_without_a_dense_run(tmp_path):
    few = {"block_shapes": 8, "micro_batch_shapes": 8, "most_shapes": 8}
    free = {**few, "block_shapes": 9}
    within = make_run(tmp_path / "within" / "results.h5", 0.6, shapes=few)
    unknown = make_run(tmp_path / "unknown" / "results.h5", 0.6, shapes=free)
    failed = make_run(tmp_path / "failed" / "results.h5", 0.6, shapes=free, dense_pass_seconds=np.nan)
    timed = make_run(tmp_path / "timed" / "results.h5", 0.6, shapes=free, dense_pass_seconds=2.5)
    lines = report([within, unknown, failed, timed]).splitlines()
    assert not any(line.startswith("within:") for line in lines)
    for name in ("unknown", "failed"):
        (line,) = (line for line in lines if line.startswith(f"{name}: "))
        assert line.endswith("What that cost is not known: there is no dense time to compare with.")
    (line,) = (line for line in lines if line.startswith("timed: "))
    # 20 FLOP took 2.5 s; 0.6 and 0.1 s are of 10 FLOP.
    assert line.endswith(
        "Forward and backward took 0.93 times the ideal, 60.0% of the dense passes that it timed at its start."
    )


def test_page(paths, tmp_path):
    shapes = {"block_shapes": 20, "micro_batch_shapes": 20, "most_shapes": 8}
    section, said = ENGINES["fsdp2"]
    free = make_run(tmp_path / "free" / "results.h5", 0.6, shapes=shapes, engine=section)
    page = tmp_path / "new" / "report.html"
    report([*paths, free], page=page, png=tmp_path / "picture.png")
    text = page.read_text()
    assert f"<p>{FREE}</p>" in text
    assert f"<p>free: {said}.</p>" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)  # nothing from a network
    assert "<script" not in text
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert len(images) >= 9
    for image in images:
        svg = ElementTree.fromstring(base64.b64decode(image))
        assert svg.tag.endswith("svg")
        assert not [node for node in svg.iter() if node.get("href", "").startswith("http")]
    assert "36.0" not in text
    assert "compute_budget: 0.6" in text
    assert imread(tmp_path / "picture.png").shape[0] > 400
    with pytest.raises(ResultsError, match="cannot write the page"):
        report(paths, page=paths[0] / "report.html")


def test_names_cannot_become_markup_and_a_figure_of_no_numbers_is_left_out_in_words(tmp_path):
    path = make_run(tmp_path / "<img src=x>" / "results.h5", 0.6, steps=10)
    with h5py.File(path, "r+") as file:
        file["scores/forward"][...] = np.nan
    report([path, path], page=tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<img src=x>" not in text
    assert text.count("Cannot be drawn from what is recorded: ") == 1


def test_runs_that_recorded_next_to_nothing(tmp_path):
    paths = []
    for name in ("a", "b"):
        with ResultsWriter(tmp_path / name / "same" / "results.h5") as writer:
            writer.append("plans", {"step": 0, "block_shapes": 9, "most_shapes": 8})
            writer.append("steps", {"step": 0, "plan": 0})
        paths.append(writer.path)
    unfinished = ResultsWriter(tmp_path / "c" / "results.h5")
    unfinished.flush()
    text = report([*paths, unfinished.path], page=tmp_path / "report.html", png=tmp_path / "report.png")
    assert os.path.join("a", "same") in text
    assert os.path.join("b", "same") in text
    assert text.count("What that cost is not known") == 2
    assert f"{unfinished.path}  (still going on)" in text
    assert "<p>Still going on: c.</p>" in (tmp_path / "report.html").read_text()
    unfinished._release()  # as when its process is killed
    assert f"{unfinished.path}  (did not end in order)" in report([unfinished.path], page=tmp_path / "c.html")
    assert "<p>Did not end in order: c.</p>" in (tmp_path / "c.html").read_text()


def test_no_runs_and_no_file():
    with pytest.raises(ResultsError, match="no runs"):
        report([])
    with pytest.raises(ResultsError, match="no results file"):
        report([Path("absent")])


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name, paths, tmp_path, capsys):
    arguments = ["figure", name, *map(str, paths), "--json", "--output", str(tmp_path / "a.png")]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)
    pixels = imread(tmp_path / "a.png")
    assert min(pixels.shape[:2]) > 300
    assert 0.01 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.95  # neither blank nor solid


def test_a_figure_by_itself(paths, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["figure", "pareto", *map(str, paths), "--output", "a.pdf"]) == 0
    assert tuple(capsys.readouterr()) == ("", "wrote a.pdf\n")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_accuracy_ends_at_100_and_an_interval_is_promised_where_there_is_one(tmp_path):
    paths = [make_run(tmp_path / f"{seed}" / "results.h5", 0.6, seed=seed, lost=-0.61) for seed in range(2)]
    paths.append(make_run(tmp_path / "single" / "results.h5", 1.0, lost=-0.61))  # 100 % at the end
    marks = []
    with open_runs(paths) as runs:
        for figure in (compare, pareto, learning):
            drawn = figure.draw(figure.measure(runs))
            axis = next(axis for axis in drawn.axes if "accuracy" in axis.get_ylabel())
            assert axis.get_ylim()[1] == 100
            marks += [
                line for line in axis.lines if line.get_marker() in "o*D" and line.get_ydata()[0] == 100
            ]
            if figure is compare:
                (legend,) = drawn.legends
                labels = [text.get_text() for text in legend.get_texts()]
                assert labels == ["one run", "mean and its 95 % interval", "mean"]
        alone = compare.draw(compare.measure(runs[2:])).legends[0]
    assert [text.get_text() for text in alone.get_texts()] == ["one run", "mean"]
    assert marks
    assert not any(line.get_clip_on() for line in marks)


def test_a_page_says_where_it_is_and_that_it_took_the_place_of_another(paths, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for told in ("", ", in place of the one before"):
        assert main(["report", str(paths[0])]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"page: {tmp_path}/report.html{told}"


def test_figures_explain_faults(paths, tmp_path, capfd):
    unscored = method_run(tmp_path / "unscored.h5", "tokens", 0.5, 0, 0.7)
    for arguments, message in (
        (["learning", "absent"], "no results file at absent"),
        (["plans", str(paths[1]), "--plan", "7"], "has no plan 7"),
        (["summary", str(paths[1]), "--output", str(tmp_path / "a.xyz")], "end it with .png"),
        (["scores", str(unscored)], "no scores in these runs: planner tokens reads none"),
    ):
        assert main(["figure", *arguments]) == 1
        assert message in capfd.readouterr().err


def test_a_run_that_is_named_twice_counts_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    method_run(Path("runs/dense/results.h5"), "dense", 1, 0, 0.8)
    method_run(Path("runs/tokens/results.h5"), "tokens", 0.5, 0, 0.7)
    twice = ["runs/dense", "runs/dense/", "runs/tokens", str(tmp_path / "runs/dense/results.h5")]
    assert main(["figure", "compare", *twice, "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert [group["runs"] for group in groups] == [["dense"], ["tokens"]]


def test_a_folder_whose_run_never_began_is_left_out_in_words(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    method_run(Path("runs/a/results.h5"), "tokens", 0.5, 0, 0.7)
    Path("runs/refused").mkdir()
    assert main(["report", "runs/a", "runs/refused"]) == 0
    told = capfd.readouterr()
    assert "runs/refused: left out, since no results.h5 is in it" in told.err
    assert "a/results.h5" in told.out
    assert main(["report", "runs/refused"]) == 1
    assert "no results file at runs/refused/results.h5" in capfd.readouterr().err


def test_a_reference_on_other_data_is_told(tmp_path):
    paths = [tmp_path / "run.h5", tmp_path / "dense.h5"]
    for path, root, epochs in zip(paths, ("cats.h5", "dogs.h5"), (1, 3), strict=True):
        with ResultsWriter(path) as writer:
            writer.put(
                "config",
                {"yaml": f"{{run: {{seed: 0}}, data: {{root: {root}}}, train: {{epochs: {epochs}}}}}"},
            )
            writer.append(
                "steps",
                {"step": 0, "plan": -1, "dense_flops": [2.0], "executed_flops": [1.0], "step_seconds": [1.0]},
            )
            writer.append("evaluations", {"step": 1, "epoch": 1, "accuracy": 0.5, "samples": 10})
    page = tmp_path / "page.html"
    told = "times and accuracy are of unlike runs, which differ not only in their plans: "
    told += "train.epochs (1, 3), data.root (cats.h5, dogs.h5)"
    assert told in report(paths[:1], reference=paths[1:], page=page)
    assert told in html.unescape(page.read_text())
    assert "unlike" not in report(paths[:1], reference=paths[:1])


@pytest.mark.parametrize("margin", ["-1", "nan", "half"])
def test_a_margin_that_is_none_is_refused(margin, tmp_path, capfd):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), f"--margin={margin}"])
    assert f"argument --margin: '{margin}' is not a number from 0 to 100" in capfd.readouterr().err


def method_run(path, planner, budget, seed, accuracy, complete=True, steps_share=1.0):
    """Spends `budget` of 200 FLOP and of 10 s, times `steps_share`."""
    settings = f"run: {{name: x, seed: {seed}}}\nplan: {{planner: {planner}, compute_budget: {budget}}}\n"
    settings += f"train: {{steps_share: {steps_share}}}\n"
    budget *= steps_share
    writer = ResultsWriter(path)
    writer.put("config", {"yaml": settings})
    step = {"step": 0, "plan": -1, "dense_flops": [200.0], "executed_flops": [200 * budget]}
    writer.append("steps", {**step, "step_seconds": [10 * budget]})
    writer.append("evaluations", {"step": 1, "epoch": 1, "accuracy": accuracy, "samples": 1000})
    writer.close(complete=complete)
    return path


def test_a_share_of_the_steps_is_a_method_of_its_own_under_a_plan_and_a_budget_of_dense_runs(tmp_path):
    dense = [method_run(tmp_path / f"dense{seed}.h5", "dense", 1, seed, 0.8) for seed in range(2)]
    kinds = {("tokens", 0.4, 1.0): 0.799, ("tokens", 0.5, 0.8): 0.7, ("dense", 1, 0.5): 0.6}
    runs = [
        method_run(
            tmp_path / f"{kind[0]}{kind[2]}-{seed}.h5",
            *kind[:2],
            seed,
            accuracy + seed / 10000,
            steps_share=kind[2],
        )
        for kind, accuracy in kinds.items()
        for seed in range(2)
    ]
    with open_runs([*runs, *dense]) as opened, open_runs(dense) as reference:
        numbers = sufficient.measure(opened, reference, 0.5)
    enough = "0.40 of the reference's compute and 0.40 of its time are enough to lose no more than 0.5 points of top-1"
    assert sufficient.sentences(numbers)[:2] == [
        f"planner=tokens, steps_share=1.0: {enough}",
        "planner=tokens, steps_share=0.8: may lose more than 0.5 points of top-1 at every budget that was run",
    ]
    assert [len(method["budgets"]) for method in numbers["methods"]] == [1, 1, 2]


def test_the_least_that_is_enough_is_between_the_budgets_where_the_bound_crosses_the_margin(tmp_path, capsys):
    dense = [
        method_run(tmp_path / f"dense{seed}.h5", "dense", 1, seed, 0.8 + 0.01 * seed) for seed in range(3)
    ]
    below = {0.8: (0.0, 0.1, -0.1), 0.6: (-0.2, -0.1, -0.3), 0.4: (-1.0, -1.2, -0.8)}  # points
    runs = [
        method_run(
            tmp_path / f"tokens{budget}-{seed}.h5",
            "tokens",
            budget,
            seed,
            0.8 + 0.01 * seed + points[seed] / 100,
        )
        for budget, points in below.items()
        for seed in range(3)
    ]
    runs.append(method_run(tmp_path / "stopped.h5", "tokens", 0.2, 0, 0.9, complete=False))
    single = [method_run(tmp_path / "joint.h5", "joint", 0.4, 0, 0.9)]
    with open_runs([*runs, *single]) as opened, open_runs(dense) as reference:
        numbers = sufficient.measure(opened, reference, 0.5)
    tokens, joint = numbers["methods"]
    assert tokens["label"] == "planner=tokens"
    half = 2.919986 / 3**0.5  # Student's t at 2 degrees of freedom, one-sided 95 %
    bounds = [-1.0 - 0.2 * half, -0.2 - 0.1 * half, 0.0 - 0.1 * half]
    assert [point["bound"] for point in tokens["budgets"]] == pytest.approx(bounds, abs=1e-5)
    share = (bounds[1] + 0.5) / (bounds[1] - bounds[0])
    assert tokens["compute"] == pytest.approx(0.6 - 0.2 * share, abs=1e-5)
    assert tokens["seconds"] == pytest.approx(0.6 - 0.2 * share, abs=1e-5)
    assert joint["compute"] is None
    page = tmp_path / "page.html"
    assert sufficient.sentences(numbers)[0].startswith(
        f"planner=tokens: {tokens['compute']:.2f} of the reference's compute and "
    )
    paths = [*map(str, single), "--reference", *map(str, dense)]
    assert main(["report", *paths, "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "planner=joint: not known whether it loses more than 0.5 points of top-1: run two seeds" in out
    assert "How little is enough" in page.read_text()
    with (
        open_runs(runs) as opened,
        open_runs([tmp_path / "stopped.h5"]) as reference,
        pytest.raises(ResultsError, match="--reference"),
    ):
        sufficient.measure(opened, reference, 0.5)
    again = shutil.copy(runs[0], tmp_path / "again.h5")
    with (
        open_runs([*runs, again]) as opened,
        open_runs(dense) as reference,
        pytest.raises(ResultsError, match=r"again\.h5: seed 0 is that of .*tokens0\.8-0\.h5, too: leave one"),
    ):
        sufficient.measure(opened, reference, 0.5)
