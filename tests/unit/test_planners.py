"""Every planner against brute force on small instances, and what each promises about its plans."""

import functools
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning import PlanProblem, SkipPlan, check, solve, solve_joint
from d2ft_hpc.planning.problem import BUDGET_EPSILON
from tests.posing import pose_flat

OPTIONS = {
    "paper": {},
    "joint": {},
    "makespan": {},
    "static": {},
    "depth": {},
    "random": {"seed": 1},
}
UNEVEN = "equally many heads on every rank"
REASONS = {
    "paper": ["exceeds the memory budget"],
    "random": ["exceeds the memory budget"],
    "makespan": [UNEVEN],
    "static": [UNEVEN],
    "depth": ["FORWARD_ONLY in every block"],
    "joint": [],
}


def every_plan(problem):
    """All 3^cells plans, uint8 [plan, cell], and which of them keep the budgets."""
    cells = problem.forward_score.size
    plans = np.array(list(itertools.product((0, 1, 2), repeat=cells)), dtype=np.uint8)
    allowed = np.ones(len(plans), dtype=bool)
    for costs, budgets in (
        (problem.compute_cost, problem.compute_budget),
        (problem.communication_cost, problem.communication_budget),
    ):
        for device, budget in enumerate(budgets):
            cost = np.asarray(costs)[plans[:, problem.device.ravel() == device]].sum(axis=1)
            allowed &= cost <= budget + 1e-9
    full = (plans == 2).reshape(-1, *problem.forward_score.shape)
    for device, memory in enumerate(problem.memory_budget):
        allowed &= (full * (problem.device == device)).sum(axis=(2, 3)).max(axis=1) <= memory
    return plans, allowed


def scores_of(problem, plans):
    """The objective, written out once more: mean-normalised scores of what runs."""
    forward, backward = (
        (score / score.mean() if score.mean() > 0 else np.ones_like(score)).ravel()
        for score in (problem.forward_score, problem.backward_score)
    )
    return (plans >= 1) @ forward + (plans == 2) @ backward


@st.composite
def problems(draw, max_cells=7):
    shape = draw(
        st.sampled_from(
            [
                (rows, blocks, heads)
                for rows in range(1, 8)
                for blocks in (1, 2, 3)
                for heads in (1, 2, 3)
                if rows * blocks * heads <= max_cells
            ]
        )
    )
    replicas = draw(st.sampled_from([r for r in (1, 2, 3) if shape[0] % r == 0]))
    values = st.one_of(st.floats(0, 10, allow_subnormal=False), st.sampled_from([0.0, 1.0, 1e-12, 1e6]))
    size = math.prod(shape)
    forward, backward = (
        np.array(draw(st.lists(values, min_size=size, max_size=size))).reshape(shape) for _ in range(2)
    )
    ranks, stages = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2)]))
    heads = shape[1] * shape[2]
    rank = np.array(draw(st.lists(st.integers(0, ranks - 1), min_size=heads, max_size=heads))).reshape(
        shape[1:]
    )
    stage = np.minimum(np.arange(shape[1]), stages - 1)
    devices = replicas * (int(stage.max()) + 1) * ranks
    memory = draw(st.sampled_from([math.inf, math.inf, 1.0, 2.0]))
    costs, budgets = [], []
    for _ in range(2):
        steps = draw(
            st.sampled_from(
                [(0, 1 / 3, 1), (0, 0.5, 1), (0, 0.3517, 1), (0, 0.8, 1), (0, 0, 1), (0.1, 0.4, 2)]
            )
        )
        costs.append(steps)
        device = (np.arange(shape[0]) % replicas)[:, None, None] * (devices // replicas)
        device = device + stage[:, None] * ranks + rank
        cells = np.bincount(device.ravel(), minlength=devices)
        share = np.array([draw(st.sampled_from([0.0, 0.2, 0.5, 0.61, 0.8, 1.0, math.inf])) for _ in cells])
        budgets.append(np.where(cells > 0, cells, 1) * (steps[0] + share * (steps[2] - steps[0])))
    return PlanProblem(
        forward_score=forward,
        backward_score=backward,
        replicas=replicas,
        rank=rank,
        stage=stage,
        device_speed=np.ones(devices),
        memory_budget=np.full(devices, memory),
        compute_cost=costs[0],
        communication_cost=costs[1],
        compute_budget=budgets[0],
        communication_budget=budgets[1],
    )


def random_problem(seed=0, shape=(10, 4, 3), replicas=2, **options):
    generator = np.random.default_rng(seed)
    forward, backward = generator.lognormal(0, 1.5, (2, *shape))
    return pose_flat(forward, backward, replicas=replicas, **({"compute_budget": 0.6} | options))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_joint_finds_the_optimum_and_every_bound_holds(problem):
    plans, allowed = every_plan(problem)
    best = scores_of(problem, plans[allowed]).max()
    joint = solve(problem, "joint")
    assert joint.objective == pytest.approx(scores_of(problem, joint.operations.ravel()))
    assert joint.objective >= best * (1 - 1e-4) - 1e-9
    assert joint.objective <= best * (1 + 1e-9) + 1e-9
    assert joint.bound >= best * (1 - 1e-9)
    assert joint.bound >= joint.objective
    assert joint.gap == pytest.approx((joint.bound - joint.objective) / joint.bound if joint.bound else 0)
    assert joint.gap <= 1.001e-4
    assert joint.status == "optimal"


def test_costs_may_be_integers():
    scores = np.zeros((2, 1, 1))
    place = {"rank": np.zeros((1, 1), int), "stage": np.zeros(1, int), "device_speed": np.ones(1)}
    budgets = {"compute_budget": np.zeros(1), "communication_budget": np.ones(1), "memory_budget": np.ones(1)}
    problem = PlanProblem(
        scores, scores, 1, compute_cost=(0, 0, 1), communication_cost=(0, 1 / 3, 1), **place, **budgets
    )
    assert not (solve(problem, "depth").operations == 2).any()


@settings(max_examples=50, deadline=None)
@given(problems(max_cells=30))
def test_no_planner_exceeds_a_budget(problem):
    best = functools.cache(lambda: solve(problem, "joint").bound)
    for planner, options in OPTIONS.items():
        try:
            plan = solve(problem, planner, **options)
        except PlanError as error:  # some planners cannot plan every problem, and say so
            assert any(reason in str(error) for reason in REASONS[planner]), error  # noqa: PT017
            continue
        for costs, budgets, used in (
            (problem.compute_cost, problem.compute_budget, problem.used_compute(plan)),
            (problem.communication_cost, problem.communication_budget, problem.used_communication(plan)),
        ):
            cost = np.asarray(costs)[plan.operations]
            by_hand = [cost[problem.device == device].sum() for device in range(problem.num_devices)]
            np.testing.assert_allclose(used, by_hand, atol=1e-12)
            assert (by_hand <= budgets + 1e-6).all()
        full = (plan.operations == 2)[..., None] * (
            problem.device[..., None] == np.arange(problem.num_devices)
        )
        np.testing.assert_array_equal(problem.used_memory(plan), full.sum(axis=(1, 2)).max(axis=0))
        assert (problem.used_memory(plan) <= problem.memory_budget).all()
        assert 0 <= plan.gap <= 1
        assert plan.bound >= plan.objective
        assert plan.objective <= best() * (1 + 1e-9) + 1e-9
        assert plan == solve(problem, planner, **options)


@settings(max_examples=40, deadline=None)
@given(problems(max_cells=20), st.integers(0, 99))
def test_the_order_of_rows_blocks_and_heads_does_not_matter(problem, seed):
    generator = np.random.default_rng(seed)
    order = np.ix_(*(generator.permutation(length) for length in problem.forward_score.shape))
    fields = {name: getattr(problem, name) for name in problem.__dataclass_fields__}
    for name in ("forward_score", "backward_score"):
        fields[name] = fields[name][order]
    assume(problem.replicas == 1)
    fields["rank"] = fields["rank"][order[1][0], order[2][0]]
    fields["stage"] = fields["stage"][order[1].ravel()]
    shuffled = PlanProblem(**fields)
    here, there = solve(problem, "joint"), solve(shuffled, "joint")
    assert there.objective == pytest.approx(here.objective, rel=2e-4, abs=1e-9)
    assert max(here.objective, there.objective) <= min(here.bound, there.bound) * (1 + 1e-9)


def best_rows(score, among, budget, cost):
    """The rows of the best set that a budget pays for, by trying all of them; the earliest set if tied."""
    sets = [s for n in range(len(among) + 1) for s in itertools.combinations(among, n) if n * cost <= budget]
    return set(max(sets, key=lambda rows: (score[list(rows)].sum() if rows else 0.0, len(rows))))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    share=st.sampled_from([0.1, 0.4, 0.6, 0.75, 1.0]),
    full_share=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    seed=st.integers(0, 9999),
)
def test_the_paper_planner_solves_both_of_its_levels(rows, share, full_share, seed):
    problem = random_problem(seed, (rows, 2, 2), 1, compute_budget=share)
    plan = solve(problem, "paper", full_share=full_share)
    for block, head in itertools.product(range(2), range(2)):
        budget = rows * share + 1e-8
        backward, forward = problem.backward_score[:, block, head], problem.forward_score[:, block, head]
        full = best_rows(backward, range(rows), budget * full_share, 1.0)
        rest = [row for row in range(rows) if row not in full]
        active = full | best_rows(forward, rest, budget - len(full), 1 / 3)
        operations = plan.operations[:, block, head]
        assert set(np.flatnonzero(operations)) == active
        upgraded = set(np.flatnonzero(operations == 2)) - full
        spent = len(full) + (len(active) - len(full)) / 3
        assert full <= set(np.flatnonzero(operations == 2))
        assert len(upgraded) == min(math.floor((budget - spent) * 1.5), len(active) - len(full))
        for row in upgraded:
            assert all(backward[row] >= backward[other] for other in active - full - upgraded)


def test_the_paper_planner_keeps_ties_in_row_order():
    equal = np.ones((5, 2, 2))
    problem = pose_flat(equal, equal, replicas=1, compute_budget=0.6)
    plan = solve(problem, "paper")
    np.testing.assert_array_equal(plan.operations[:, 0, 0], [2, 2, 1, 1, 1])
    assert (plan.operations == plan.operations[:, :1, :1]).all()
    assert plan.objective <= solve(problem, "joint").objective <= plan.bound


def test_random_draws_the_same_numbers_of_operations_for_other_rows():
    problem = random_problem(shape=(10, 12, 6), communication_budget=0.7)
    paper = solve(problem, "paper")
    one, two = (solve(problem, "random", seed=seed) for seed in (1, 2))
    assert one != two
    for plan in (one, two):
        assert plan.shares() == paper.shares()
        assert plan.objective < paper.objective
        assert plan.gap > 0.1


def test_joint_uses_its_budget_better_than_the_others():
    problem = random_problem(shape=(10, 12, 6), communication_budget=0.55)
    score = {planner: solve(problem, planner, **options).objective for planner, options in OPTIONS.items()}
    assert score["joint"] > score["paper"] > score["random"]
    assert score["joint"] >= score["makespan"] * (1 - 1e-4) > score["static"]


@pytest.mark.parametrize("scores", [np.zeros((4, 2, 3)), np.full((4, 2, 3), 7.0), np.full((4, 2, 3), 1e308)])
def test_scores_without_differences_are_legal(scores):
    problem = pose_flat(scores, scores, replicas=2, compute_budget=0.5)
    for planner, options in OPTIONS.items():
        plan = solve(problem, planner, **options)
        assert 0 < plan.objective <= 48
    assert solve(problem, "joint").objective == pytest.approx(2 * (12 + 3))  # all run, 3 of each 12 FULL


def test_dense_is_a_plan_under_a_dense_budget_only():
    dense = solve(random_problem(compute_budget=1.0), "dense")
    assert dense.is_dense
    assert dense.gap == 0
    assert dense.objective == pytest.approx(2 * 120)
    for planner in ("joint", "paper"):
        assert solve(random_problem(compute_budget=1.0), planner).is_dense
    with pytest.raises(PlanError, match=r"dense plan exceeds the compute budget of rank 0.*60.*36"):
        solve(random_problem(), "dense")


def test_check_names_device_use_and_budget():
    problem = random_problem(shape=(4, 2, 3), compute_budget=0.5)
    operations = np.zeros((4, 2, 3), dtype=np.uint8)
    operations[1::2] = 1
    operations[1] = 2
    check(SkipPlan(operations * 0, 2), problem)
    with pytest.raises(PlanError, match=r"compute budget of rank 1: it uses 8, allowed are 6"):
        check(SkipPlan(operations, 2), problem)
    roomy = random_problem(shape=(4, 2, 3), compute_budget=1.0, communication_budget=0.5)
    with pytest.raises(PlanError, match=r"communication budget of rank 1: it uses 9, allowed are 6"):
        check(SkipPlan(operations, 2), roomy)
    with pytest.raises(PlanError, match="shape"):
        check(SkipPlan(operations, 4), problem)


@pytest.mark.parametrize("name", ["forward_score", "backward_score"])
@pytest.mark.parametrize("value", [math.nan, -0.5, math.inf])
def test_unusable_scores_are_named(name, value):
    scores = {"forward_score": np.ones((4, 2, 3)), "backward_score": np.ones((4, 2, 3))}
    scores[name][3, 1, 2] = value
    with pytest.raises(PlanError, match=f"{name} is {value} at row 3, block 1, head 2"):
        pose_flat(**scores, replicas=2, compute_budget=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_budget": 0.0}, r"compute_budget .* got 0"),
        ({"compute_budget": 1.1}, r"compute_budget .* got 1\.1"),
        ({"compute_budget": math.nan}, "compute_budget .* got nan"),
        ({"communication_budget": 0.0}, r"communication_budget .* got 0"),
        ({"forward_cost": 1.5}, r"forward_share .* got 1\.5"),
        ({"always_share": 1.0}, r"always_share .* got 1"),
        ({"replicas": 3}, "10 rows .* 3 replicas"),
        ({"replicas": 0}, "0 replicas"),
        ({"device_speed": [1.0]}, "device_speed needs 2"),
        ({"device_speed": [1.0, 0.0]}, "device_speed must be from 1e-50 to 1e\\+50"),
        ({"device_speed": [1.0, 1e-300]}, "device_speed must be from 1e-50 to 1e\\+50"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(PlanError, match=message):
        random_problem(**options)


def test_always_run_parts_are_paid_first():
    problem = random_problem(compute_budget=0.6, always_share=0.2)
    np.testing.assert_allclose(problem.compute_budget, 0.5 * 60)
    only_always = random_problem(compute_budget=0.2, always_share=0.2)
    assert solve(only_always, "joint").shares()[0] == 1
    with pytest.raises(
        PlanError, match=r"compute_budget 0\.1 gives rank 0 0\.1.*least feasible .* is 0\.2\."
    ):
        random_problem(compute_budget=0.1, always_share=0.2)


def test_devices_of_different_speedfinish_together():
    speed = np.array([1.0, 2.0, 4.0])
    problem = random_problem(
        shape=(6, 4, 3), replicas=3, compute_budget=0.5, always_share=0.1, device_speed=speed
    )
    share = 0.1 + 0.9 * problem.compute_budget / 24
    assert share.mean() == pytest.approx(0.5)
    np.testing.assert_allclose(share / speed, share[0] / speed[0])
    full = random_problem(shape=(6, 4, 3), replicas=3, compute_budget=0.8, device_speed=speed).compute_budget
    np.testing.assert_allclose(full / 24, [1.4 / 3, 2.8 / 3, 1.0])  # 2.4 dense steps, one of them rank 2's
    with pytest.raises(PlanError, match=r"rank 0 .*least feasible compute_budget is 0\.4667"):
        random_problem(shape=(6, 4, 3), replicas=3, compute_budget=0.4, always_share=0.2, device_speed=speed)
    random_problem(shape=(6, 4, 3), replicas=3, compute_budget=0.4667, always_share=0.2, device_speed=speed)


def test_a_problem_must_be_consistent():
    good = random_problem(shape=(2, 1, 2), replicas=1)
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__}
    for change, message in [
        ({"backward_score": np.ones((2, 1, 3))}, "backward_score has the shape"),
        ({"forward_score": np.ones(4)}, "forward_score must be"),
        ({"rank": np.full((1, 2), 1)}, "ranks 1 to 1"),
        ({"rank": np.full((1, 2), -1)}, "ranks -1"),
        ({"rank": np.zeros((2, 1))}, "rank has the shape"),
        ({"stage": [-1]}, "device_speed needs"),
        ({"stage": [1]}, "device_speed needs"),
        ({"device_speed": [0.0]}, "device_speed must be"),
        ({"memory_budget": [-1.0]}, "memory budget of rank 0 is -1"),
        ({"compute_budget": np.ones(2)}, "compute_budget needs 1"),
        ({"compute_budget": [-1.0]}, "compute budget of rank 0 is -1; the least feasible one is 0"),
        ({"compute_budget": [math.nan]}, "compute budget of rank 0 is nan"),
        ({"compute_cost": (0.5, 0.6, 1.0), "compute_budget": [1.0]}, "is 1; the least feasible one is 2"),
        ({"communication_cost": (0.0, 2.0, 1.0)}, "communication_cost must be"),
        ({"always_share": -0.1}, "always_share"),
    ]:
        with pytest.raises(PlanError, match=message):
            PlanProblem(**(fields | change))


def test_float_error_in_a_budget_decides_nothing():
    scores = np.ones((3, 1, 1))
    for budget in (0.1 + 0.2, 0.3, 0.3 - 1e-13):  # of which the first is above the second
        problem = pose_flat(np.ones((10, 1, 1)), np.ones((10, 1, 1)), replicas=1, compute_budget=budget)
        assert problem.used_compute(solve(problem, "joint"))[0] == pytest.approx(3.0)
    third = pose_flat(scores, scores, replicas=1, compute_budget=1 / 3 - BUDGET_EPSILON / 3)
    assert solve(third, "joint").shares()[1] == 1  # three forwards, each a third


def test_without_time_the_greedy_plan_comes_with_a_bound_that_holds():
    problem = random_problem(shape=(10, 12, 6))
    late = solve_joint(problem, time_limit_seconds=1e-9, relative_gap=0.0)
    proved = solve_joint(problem)
    assert late.status == "greedy: time limit"
    check(late, problem)
    assert late.objective <= proved.objective * (1 + 1e-4)
    assert late.bound >= proved.objective


def test_a_model_too_large_for_the_solver_is_left_to_greedy_and_said():
    problem = random_problem(shape=(16, 24, 16), replicas=1, memory_budget=0.31, communication_budget=0.55)
    plan = solve(problem, "joint", relative_gap=0.0)
    assert plan.status == "greedy: 12290 integer variables are more than HiGHS is given (10000)"
    assert 0 <= plan.gap < 1e-5
    assert solve(problem, "joint").status == "optimal"


@pytest.mark.parametrize(
    ("planner", "options", "message"),
    [
        ("simplex", {}, "no planner 'simplex' of micro-batches: input should be 'dense', 'paper'"),
        ("jiont", {}, r"no planner 'jiont' of micro-batches: did you mean 'joint'\?"),
        ("paper", {"full_share": 1.2}, r"full_share .* got 1\.2"),
        ("random", {"seed": 0, "full_share": -1}, "full_share .* got -1"),
        ("joint", {"time_limit_seconds": 0}, "time_limit_seconds .* got 0"),
        ("joint", {"relative_gap": 1}, "relative_gap .* got 1"),
    ],
)
def test_planner_options_out_of_range_are_named(planner, options, message):
    with pytest.raises(PlanError, match=message):
        solve(random_problem(), planner, **options)


def test_solving_is_timed():
    assert solve(random_problem(), "joint").solve_seconds > 0
    assert solve_joint(random_problem()).solve_seconds == 0  # `solve` fills it in


@settings(max_examples=60, deadline=None)
@given(problems(max_cells=7), st.sampled_from([0.0, 0.34, 0.5, 0.67]))
def test_joint_runs_as_many_heads_of_each_block_as_must(problem, most_shortcut):
    plans, allowed = every_plan(problem)
    shaped = plans.reshape(-1, *problem.forward_score.shape)
    for device in range(problem.num_devices):
        mine = problem.device == device
        held = mine.sum(axis=2)
        running = ((shaped >= 1) & mine).sum(axis=3)
        allowed &= (held - running <= most_shortcut * held + 1e-9).all(axis=(1, 2))
    options = {"most_shortcut": most_shortcut}
    if not allowed.any():
        with pytest.raises(PlanError, match="most_shortcut"):
            solve(problem, "joint", **options)
        return
    best = scores_of(problem, plans[allowed]).max()
    plan = solve(problem, "joint", **options)
    assert allowed[(plans == plan.operations.ravel()).all(axis=1).argmax()]
    assert best * (1 - 1e-4) - 1e-9 <= plan.objective <= best * (1 + 1e-9) + 1e-9
    assert plan.bound >= best * (1 - 1e-9)


def test_the_solver_says_nothing():
    """HiGHS has its banner for the first solver of a process."""
    program = "from d2ft_hpc.planning.highs import *; LinearProgram(np.zeros(1), np.ones(1)).solve(1.0)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout + shown.stderr == ""
