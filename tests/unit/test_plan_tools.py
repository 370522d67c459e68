"""`d2ft-hpc plan` and the bench of planners: what they read, print and write."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from analysis.planner.bench import COMPARED, benchmark, report, synthetic_problem
from d2ft_hpc.cli import main
from d2ft_hpc.errors import PlanError, ResultsError
from d2ft_hpc.parallel.rank_layout import Placement, RankLayout
from d2ft_hpc.plan_report import (
    SavedScores,
    describe,
    describe_alone,
    describe_difference,
    problem_of,
    read_checked,
    read_scores,
    save_heat_map,
)
from d2ft_hpc.planning import Budgets, Devices, in_order, pose, solve
from d2ft_hpc.planning.table import PLANNERS as ALL_PLANNERS


def saved_scores():
    forward, backward = np.random.default_rng(0).lognormal(0, 1, (2, 4, 6, 4))
    return SavedScores(forward, backward, replicas=1, forward_share=0.35, always_share=0.1)


def test_the_bench_ends_with_one_line_of_json_for_every_planner():
    results = benchmark(blocks=4, heads=4, micro_batches=4, ranks=2, stages=2, repeats=1)
    lines = report(results, as_json=True).splitlines()
    read = json.loads(lines[-1])
    assert read == results
    for planner in COMPARED:
        assert {"seconds", "gap", "score", "waste", "bound"} <= set(read[planner])
        assert 0 < read[planner]["score"] <= read[planner]["bound"] * (1 + 1e-9) <= 1 + 1e-9
    assert read["makespan"]["waste"] == pytest.approx(0, abs=1e-9)
    assert read["makespan"]["score"] <= read["bound"]
    assert "{" not in report(results, as_json=False)


def test_the_bench_is_reproducible_and_notes_what_has_no_plan():
    options = {"blocks": 4, "heads": 8, "micro_batches": 4, "ranks": 4, "heterogeneous": True, "repeats": 1}
    one, two = benchmark(**options), benchmark(**options)
    assert one["makespan"]["score"] == two["makespan"]["score"]
    assert "depth" not in one
    assert "FORWARD_ONLY in every block" in one["notes"][0]
    with pytest.raises(PlanError, match="4 blocks cannot be divided evenly over 3 stages"):
        benchmark(blocks=4, heads=4, micro_batches=4, ranks=2, stages=3)


def test_synthetic_scores_differ_by_seed_alone():
    one, same, other = (synthetic_problem((4, 3, 4), ranks=2, seed=seed).forward_score for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_a_plan_is_described_device_by_device_with_its_time(tmp_path):
    problem = problem_of(saved_scores(), Budgets(0.6), ranks=2, stages=2, placed=True)
    plan = solve(problem, "makespan")
    text = describe(plan, problem)
    assert text.count("stage 1, rank 1") == 1
    assert "gap" in text
    shares = [
        float(line.split(":")[1].split("%")[0]) for line in text.splitlines() if "of the dense step (" in line
    ]
    assert 50 < shares[0] <= 60.5  # not more than the budget
    paper = [float(line.split(":")[1].split("%")[0]) for line in text.splitlines() if "paper's plan:" in line]
    assert paper[0] > shares[0]
    plan.write(tmp_path / "plan.h5")
    assert read_checked(tmp_path / "plan.h5", problem) == plan
    assert describe_difference(plan, plan) == "the plans are the same"
    rows = plan.num_rows
    assert describe_difference(plan, plan.at((2, 3))) == f"images change their size in {rows} of {rows} rows"
    assert "heads, images of 2 x 3 patches\n" in describe_alone(plan.at((2, 3)))
    assert "images" not in describe_alone(plan)
    assert "entries change: " in describe_difference(solve(problem, "paper"), plan)
    with pytest.raises(PlanError, match="exceeds the compute budget"):
        read_checked(tmp_path / "plan.h5", problem_of(saved_scores(), Budgets(0.4), ranks=2))
    save_heat_map(plan, tmp_path / "heat.png")
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(PlanError, match="picture cannot be written"):
        save_heat_map(plan, tmp_path / "missing" / "heat.png")


def test_layouts_that_do_not_divide_are_refused():
    for options, message in (
        ({"stages": 4}, "6 blocks cannot be divided evenly over 4 stages"),
        ({"ranks": 3}, "4 heads cannot be divided evenly over 3 ranks"),
        ({"ranks": 2, "speeds": [1.0]}, "2 ranks but 1 speeds"),
    ):
        with pytest.raises(PlanError, match=message):
            problem_of(saved_scores(), Budgets(0.6), **options)


def test_saved_scores_and_a_runs_placement_pose_the_same_problem():
    scores, layout = saved_scores(), RankLayout.of(4, 0, stages=2, tensor_ranks=2)
    placement = Placement(layout, [range(3), range(3, 6)], in_order(6, 4, 2))
    budgets = Budgets(0.6, communication=0.7, memory=0.5)
    devices = Devices(layout.replicas, placement.owner, placement.stage)
    of_run = pose([scores.forward, scores.backward], scores, budgets, devices)
    saved = problem_of(scores, budgets, ranks=2, stages=2)
    for field in dataclasses.fields(of_run):
        np.testing.assert_array_equal(getattr(saved, field.name), getattr(of_run, field.name), field.name)


def test_planning_from_saved_scores_needs_no_torch():
    code = (
        "import sys, numpy as np; from d2ft_hpc.plan_report import Budgets, SavedScores, describe, problem_of, solve;"
        "scores = SavedScores(*np.ones((2, 2, 2, 2)), replicas=1, forward_share=0.35, always_share=0.1);"
        "problem = problem_of(scores, Budgets(0.6), ranks=2, placed=True);"
        "describe(solve(problem, 'makespan'), problem); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_scores_are_read_from_a_results_file(tmp_path):
    results = pytest.importorskip("d2ft_hpc.results")
    scores = saved_scores()
    with results.ResultsWriter(tmp_path / "results.h5") as writer:
        writer.put("environment", {}, {"world_size": 2})
        flops = {"always_flops": 24.0, "full_flops": 10.0, "forward_only_flops": 3.5}
        writer.put("model", {}, {"num_blocks": 6, "num_heads": 4, **flops})
        for index, factor in enumerate((1, 2)):
            data = {"forward": scores.forward.astype("f4") * factor, "backward": scores.backward.astype("f4")}
            writer.append("scores", {"step": index, **data})
    for index, factor in ((0, 1), (1, 2), (-1, 2)):
        read = read_scores(tmp_path, index)
        np.testing.assert_allclose(read.forward, scores.forward * factor, rtol=1e-6)
    assert (read.replicas, read.forward_share) == (2, 0.35)
    assert read.always_share == pytest.approx(24 / 264)
    with pytest.raises(ResultsError, match="holds scores 0 to 1, asked for 2"):
        read_scores(tmp_path, 2)


@pytest.mark.parametrize("frozen", ["[0, 1]", "[[[", "x" * 10_000])
def test_scores_of_a_model_that_is_frozen_in_part_are_refused_whatever_its_file_says(tmp_path, frozen):
    results = pytest.importorskip("d2ft_hpc.results")
    with results.ResultsWriter(tmp_path / "results.h5") as writer:
        writer.put("environment", {}, {"world_size": 1})
        flops = {"always_flops": 24.0, "full_flops": 10.0, "forward_only_flops": 3.5}
        writer.put("model", {}, {"frozen_blocks": frozen, **flops})
        writer.append("scores", {"step": 0, "forward": np.ones((2, 2, 3)), "backward": np.ones((2, 2, 3))})
    with pytest.raises(ResultsError, match=r"blocks .{1,300} were frozen"):
        read_scores(tmp_path)


def test_saved_plans_are_looked_at_and_compared_without_scores(tmp_path, capfd):
    problem = problem_of(saved_scores(), Budgets(0.6), ranks=2)
    makespan, paper = solve(problem, "makespan"), solve(problem, "paper")
    makespan.write(tmp_path / "makespan.h5")
    paper.write(tmp_path / "paper.h5")
    options = ["--load", str(tmp_path / "makespan.h5"), "--diff", str(tmp_path / "paper.h5")]
    assert main(["plan", *options, "--png", str(tmp_path / "heat.png")]) == 0
    shown = capfd.readouterr().out
    assert makespan.hash[:12] in shown
    assert describe_difference(paper, makespan) in shown
    assert (tmp_path / "heat.png").exists()
    assert main(["plan"]) == 1
    assert "There is nothing to plan from" in capfd.readouterr().err


def test_a_device_that_waits_for_nobody_is_not_said_to_wait_a_negative_time():
    problem = problem_of(saved_scores(), Budgets(0.6))
    for planner in ("joint", "paper", "static"):
        assert "-0.0%" not in describe(solve(problem, planner), problem)


def test_the_command_plans_with_every_planner(tmp_path, capfd):
    results = pytest.importorskip("d2ft_hpc.results")
    scores = saved_scores()
    with results.ResultsWriter(tmp_path / "results.h5") as writer:
        writer.put("environment", {}, {"world_size": 1})
        flops = {"always_flops": 24.0, "full_flops": 10.0, "forward_only_flops": 3.5}
        writer.put("model", {}, flops)
        writer.append("scores", {"step": 0, "forward": scores.forward, "backward": scores.backward})
    for planner in (name for name, entry in ALL_PLANNERS.items() if entry.plans_heads):
        budget = "1" if planner == "dense" else "0.7"
        assert main(["plan", str(tmp_path), "--planner", planner, "--compute-budget", budget]) == 0
        assert f"({planner}, " in capfd.readouterr().out


def test_an_option_that_a_planner_needs_is_named():
    with pytest.raises(PlanError, match="Planner random needs the option seed"):
        solve(synthetic_problem((4, 3, 4), ranks=2), "random")


def test_an_option_that_a_planner_does_not_have_is_refused():
    problem = problem_of(saved_scores(), Budgets(0.6))
    with pytest.raises(PlanError, match="Planner paper has no option most_shortcut; it knows full_share"):
        solve(problem, "paper", most_shortcut=0.5)
