"""Plans for the clock, for fixed shapes and by depth: against brute force, and what they promise beyond it."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.planner.bench import waste
from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning import (
    Operation,
    SkipPlan,
    check,
    multiple_choice,
    simulate,
    solve,
    spread,
)
from d2ft_hpc.planning.multiple_choice import choose
from d2ft_hpc.planning.placement import in_order
from d2ft_hpc.planning.prices import Limit
from d2ft_hpc.planning.simulate import pipeline_time
from tests.posing import pose_flat

SHAPES = [  # rows, blocks, heads, ranks, stages, replicas
    (2, 1, 4, 2, 1, 1),
    (1, 2, 4, 2, 1, 1),
    (2, 2, 2, 2, 1, 1),
    (2, 2, 2, 1, 1, 2),
    (1, 1, 6, 3, 1, 1),
    (2, 2, 2, 1, 2, 1),
    (1, 2, 4, 2, 2, 1),
    (2, 2, 2, 2, 2, 1),
    (1, 2, 3, 1, 2, 1),
]


@st.composite
def problems(draw, shapes=tuple(SHAPES), uneven_speeds=True):
    rows, blocks, heads, ranks, stages, replicas = draw(st.sampled_from(shapes))
    generator = np.random.default_rng(draw(st.integers(0, 9999)))
    kind = draw(st.sampled_from(["different", "different", "equal", "whole"]))
    scores = {
        "different": generator.lognormal(0, 1, (2, rows, blocks, heads)),
        "equal": np.ones((2, rows, blocks, heads)),
        "whole": generator.integers(0, 3, (2, rows, blocks, heads)).astype(float),
    }[kind]
    owner = np.stack([generator.permutation(np.arange(heads) % ranks) for _ in range(blocks)])
    speeds = draw(st.sampled_from([(1.0,), (1.0, 0.5, 0.7)] if uneven_speeds else [(1.0,)]))
    return pose_flat(
        *scores,
        replicas=replicas,
        rank=owner,
        stage=np.arange(blocks) * stages // blocks,
        compute_budget=draw(st.sampled_from([0.2, 0.45, 0.6, 0.8, 1.0])),
        communication_budget=draw(st.sampled_from([None, None, 0.5])),
        memory_budget=draw(st.sampled_from([None, None, 0.5])),
        messages=draw(st.sampled_from([None, None, "replicated", "sharded"])),
        forward_cost=draw(st.sampled_from([1 / 3, 0.3517, 0.5])),
        device_speed=np.resize(speeds, replicas * stages * ranks).tolist(),
    )


def every_plan(problem):
    """All plans that keep the devices' budgets, uint8 [plan, row, block, head]."""
    shape = problem.forward_score.shape
    plans = np.array(list(itertools.product((0, 1, 2), repeat=math.prod(shape))), dtype=np.uint8)
    plans = plans.reshape(-1, *shape)
    allowed = np.ones(len(plans), dtype=bool)
    for device in range(problem.num_devices):
        mine = problem.device == device
        replica, stage = divmod(device // problem.ranks, problem.stages)
        own = plans[:, replica :: problem.replicas][:, :, problem.stage == stage]
        owner = problem.rank[problem.stage == stage]
        shares = {"replicated": lambda k, _: min(k / 2, 1.0), "sharded": lambda k, ranks: k / ranks}
        met = 0.0
        active, full = (
            np.asarray(sum(((own >= least) & (owner == r)).any(axis=3) for r in range(problem.ranks)))
            for least in (1, 2)
        )
        # A rank that is alone meets once a block.
        once = np.where((active == 1) & (problem.ranks > 1), 0.5, 1.0)
        for cost, running in zip(problem.meeting_cost, (active, full), strict=True):
            share = [shares[problem.token_layout](k, problem.ranks) for k in range(problem.ranks + 1)]
            share = [float(k) for k in range(2)] if problem.ranks == 1 else share
            met = met + cost * (once * np.array(share)[running]).sum(axis=(1, 2))
        for costs, budget, sent in (
            (problem.compute_cost, problem.compute_budget[device], 0),
            (problem.communication_cost, problem.communication_budget[device], met),
        ):
            allowed &= np.asarray(costs)[plans[:, mine]].sum(axis=1) + sent <= budget + 1e-8
        full = ((plans == 2) & mine).sum(axis=(2, 3))
        allowed &= (full <= problem.memory_budget[device]).all(axis=1)
    return plans[allowed]


def meeting_times(problem, plans):
    """What the slowest rank needs forward and backward, float64 [plan, row, block] each."""
    forward_cost = problem.compute_cost[1]
    times = []
    for runs, cost in ((plans >= 1, forward_cost), (plans == 2, 1 - forward_cost)):
        of_ranks = []
        for rank in range(problem.ranks):
            team = np.arange(plans.shape[1])[:, None] % problem.replicas * problem.stages + problem.stage
            speed = problem.device_speed[team * problem.ranks + rank]
            of_ranks.append((runs & (problem.rank == rank)).sum(axis=3) * cost / speed)
        times.append(np.max(of_ranks, axis=0))
    return times


def time_budget(problem, replica, stage):
    first = (replica * problem.stages + stage) * problem.ranks
    devices = np.arange(first, first + problem.ranks)
    dense = problem.cells_per_device[devices]
    scarce = problem.compute_budget[devices] < dense * (1 - 1e-9)
    times = (problem.compute_budget / problem.device_speed)[devices][scarce]
    return times.min() if len(times) else math.inf


def keeps_time(problem, plans):
    """Which plans are done in time: bool [plan]."""
    forward, backward = meeting_times(problem, plans)
    kept = np.ones(len(plans), dtype=bool)
    for replica in range(problem.replicas):
        rows = np.arange(replica, plans.shape[1], problem.replicas)
        if problem.stages == 1:
            spent = forward[:, rows].sum(axis=(1, 2)) + backward[:, rows].sum(axis=(1, 2))
            kept &= spent <= time_budget(problem, replica, 0) + 1e-8
            continue
        parts = [
            np.stack([times[:, rows][:, :, problem.stage == s].sum(axis=2) for s in range(problem.stages)])
            for times in (forward, backward)
        ]  # [stage, plan, row]
        row_time = min(time_budget(problem, replica, s) for s in range(problem.stages)) / len(rows)
        kept &= parts[0].max(axis=(0, 2)) + parts[1].max(axis=(0, 2)) <= row_time + 1e-8
    return kept


def scores_of(problem, plans):
    forward, backward = problem.gains()
    return (forward * (plans >= 1) + backward * (plans == 2)).sum(axis=(1, 2, 3))


def in_lock_step(problem, plans):
    """Which plans run the same numbers of heads on all ranks that run any, bool [plan]; which are all, unless messages
    between ranks are limited."""
    same = np.ones(len(plans), dtype=bool)
    limited = any(problem.meeting_cost) and np.isfinite(problem.communication_budget).all()
    meets = problem.replicas_meet and problem.replicas > 1
    for least in (1, 2):
        counts = np.stack(
            [((plans >= least) & (problem.rank == r)).sum(axis=3) for r in range(problem.ranks)]
        )
        idle = (counts == 0) if limited and not meets else np.zeros(counts.shape, dtype=bool)
        same &= ((counts == counts.max(axis=0)) | idle).all(axis=(0, 2, 3))
    return same


@settings(max_examples=120, deadline=None)
@given(problems())
def test_makespan_finds_the_best_of_all_plans_that_are_done_in_time(problem):
    plans = every_plan(problem)
    plans = plans[keeps_time(problem, plans)]
    plan = solve(problem, "makespan")
    assert keeps_time(problem, plan.operations[None]).all()
    is_even = len(set(problem.device_speed)) == 1
    only_time = np.isinf([problem.communication_budget, problem.memory_budget]).all()
    if not only_time and is_even:  # an idle rank saves no time, but it saves memory: not in lock step
        plans = plans[in_lock_step(problem, plans)]
    best = scores_of(problem, plans).max()
    # ranks of different speed: a pipeline's splits are tried on a grid
    if is_even or (only_time and problem.stages == 1):
        assert plan.objective >= best * (1 - 3e-5) - 1e-9
        assert plan.bound >= best * (1 - 1e-9)
    assert plan.objective <= best * (1 + 1e-9) + 1e-9
    assert plan.gap <= (1e-4 if is_even else 1)
    assert plan == solve(problem, "makespan")


@settings(max_examples=50, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.5]))
def test_most_shortcut_is_kept_or_refused(problem, most_shortcut):
    heads = problem.forward_score.shape[2] // problem.ranks
    least = heads - math.floor(most_shortcut * heads)
    for planner in ("makespan", "static"):
        try:
            plan = solve(problem, planner, most_shortcut=most_shortcut)
        except PlanError as error:
            assert "least feasible" in str(error) or "lock step with" in str(error)  # noqa: PT017
            continue
        for rank in range(problem.ranks):
            runs = ((plan.operations >= 1) & (problem.rank == rank)).sum(axis=2)
            assert runs.min() >= least


@pytest.mark.parametrize("planner", ["makespan", "static"])
@pytest.mark.parametrize("speeds", [[1.0, 1.0], [1.0, 0.6]])
def test_replicas_that_meet_in_every_block_are_planned_like_ranks(planner, speeds):
    scores = np.random.default_rng(5).lognormal(0, 1, (2, 6, 4, 5, 8))  # slot, block, replica x head
    budget = {"compute_budget": 0.6, "device_speed": speeds}
    as_ranks = pose_flat(*scores[:, :, :, 0], rank=in_order(4, 8, 2), **budget)
    by_replica = scores[:, :, :, 0].reshape(2, 6, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(2, 12, 4, 4)
    as_replicas = pose_flat(*by_replica, replicas=2, replicas_meet=True, **budget)
    there, here = solve(as_ranks, planner), solve(as_replicas, planner)
    assert here.objective == pytest.approx(there.objective, rel=1e-4)
    assert here.objective <= there.bound * (1 + 1e-9)
    assert simulate(here, as_replicas).step == pytest.approx(simulate(there, as_ranks).step, rel=1e-2)
    alone = pose_flat(*by_replica, replicas=2, **budget)
    assert waste(solve(alone, planner), as_replicas) >= waste(here, as_replicas)
    if planner == "makespan" and speeds == [1.0, 1.0]:
        assert waste(here, as_replicas) == 0 < waste(solve(alone, planner), as_replicas)


@settings(max_examples=80, deadline=None)
@given(problems(uneven_speeds=False))
def test_static_is_the_best_plan_of_constant_shapes(problem):
    plans = every_plan(problem)
    plans = plans[keeps_time(problem, plans)] if problem.stages == 1 else plans
    best = scores_of(problem, plans[is_static(problem, plans)]).max()
    plan = solve(problem, "static")
    assert plan.objective == pytest.approx(best)
    assert (plan.bound, plan.gap) == (plan.objective, 0.0)
    assert is_static(problem, plan.operations[None]).all()


def is_static(problem, plans):
    """bool [plan]: in each replica all ranks run the same in a block in all rows, and blocks have one of two
    neighbouring levels."""
    result = np.ones(len(plans), dtype=bool)
    for replica in range(problem.replicas):
        counts = np.array(
            [
                [
                    ((plans[:, replica :: problem.replicas] >= least) & (problem.rank == rank)).sum(axis=3)
                    for least in (1, 2)
                ]
                for rank in range(problem.ranks)
            ]
        )  # [rank, runs or FULL, plan, row, block]
        result &= (counts == counts[:1, :, :, :1]).all(axis=(0, 1, 3, 4))
        level = counts[0, :, :, 0]
        least, most = level.min(axis=2, keepdims=True), level.max(axis=2, keepdims=True)
        is_lower, is_upper = (level == least).all(axis=0), (level == most).all(axis=0)
        result &= (most - least <= 1).all(axis=(0, 2)) & (is_lower | is_upper).all(axis=1)
    return result


def test_static_keeps_to_multiples_of_heads_and_uses_the_budget_up():
    scores = np.random.default_rng(0).lognormal(0, 1, (2, 3, 12, 12))
    for multiple in (1, 2, 3):
        problem = pose_flat(*scores, compute_budget=0.6)
        plan = solve(problem, "static", heads_multiple=multiple)
        full = (plan.operations == Operation.FULL).sum(axis=2)
        assert (full % multiple == 0).all()
        assert (full == full[0]).all()
        assert problem.used_compute(plan).max() > problem.compute_budget.max() - 3 * 3 * multiple
    with pytest.raises(PlanError, match="heads_multiple=5: no such number"):
        solve(
            pose_flat(*scores, compute_budget=0.25),
            "static",
            heads_multiple=5,
            most_shortcut=1 / 3,
        )
    with pytest.raises(PlanError, match=r"heads_multiple .* got 0"):
        solve(problem, "static", heads_multiple=0)


@settings(max_examples=80, deadline=None)
@given(problems())
def test_depth_is_the_best_plan_of_its_form(problem):
    rows, blocks, heads = problem.forward_score.shape
    depths = np.array(list(itertools.product(range(blocks + 1), repeat=rows)))
    is_full = np.arange(blocks) >= blocks - depths[:, :, None]
    plans = np.repeat(np.where(is_full, 2, 1).astype(np.uint8)[..., None], heads, axis=3)
    allowed = []
    for operations in plans:
        plan = SkipPlan(operations, problem.replicas)
        with_budget = (problem.used_compute(plan) <= problem.compute_budget + 1e-8).all()
        with_budget &= (problem.used_communication(plan) <= problem.communication_budget + 1e-8).all()
        allowed.append(bool(with_budget and (problem.used_memory(plan) <= problem.memory_budget).all()))
    if not any(allowed):
        with pytest.raises(PlanError, match="least feasible"):
            solve(problem, "depth")
        return
    plan = solve(problem, "depth")
    best = scores_of(problem, plans[allowed]).max()
    assert best * (1 - 3e-5) - 1e-9 <= plan.objective <= best * (1 + 1e-9) + 1e-9
    assert plan.bound >= best * (1 - 1e-9)
    assert any((plan.operations == operations).all() for operations in plans[allowed])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([(1.0,), (1.0, 0.5)]))
def test_the_order_of_rows_and_heads_does_not_matter(seed, speeds):
    generator = np.random.default_rng(seed)
    scores = generator.lognormal(0, 1, (2, 4, 3, 6))
    rank = in_order(3, 6, 2)
    rows, heads = generator.permutation(4), generator.permutation(6)
    options = {"compute_budget": 0.6, "device_speed": np.resize(speeds, 2).tolist()}
    here = pose_flat(*scores, rank=rank, **options)
    there = pose_flat(*scores[:, rows][..., heads], rank=rank[:, heads], **options)
    for planner in ("makespan", "static", "depth"):
        one, two = solve(here, planner), solve(there, planner)
        assert two.objective == pytest.approx(one.objective, rel=4e-5)
        assert max(one.objective, two.objective) <= min(one.bound, two.bound) * (1 + 1e-9)


def large_problem(stages=1, speeds=(1.0,), equal=False, seed=0):
    generator = np.random.default_rng(seed)
    scores = np.ones((2, 8, 24, 16)) if equal else generator.lognormal(0, 0.7, (2, 8, 24, 16))
    stage = np.arange(24) * stages // 24
    speed = np.tile(np.resize(speeds, 4), stages).tolist()
    return pose_flat(
        *scores,
        rank=in_order(24, 16, 4),
        stage=stage,
        compute_budget=0.6,
        forward_cost=0.3517,
        device_speed=speed,
    )


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(("stages", "speeds"), [(1, (1.0,)), (1, (1.0, 0.5, 0.25, 1.0)), (4, (1.0,))])
def test_large_plans_are_proved_and_waste_nothing(monkeypatch, stages, speeds, equal):
    monkeypatch.setattr(multiple_choice, "_CORE_SECONDS", 60.0)  # on a machine with other work, too
    problem = large_problem(stages, speeds, equal)
    plan = solve(problem, "makespan", time_limit_seconds=300)
    assert plan.status == "optimal"
    assert plan.gap <= (1e-5 if stages > 1 else 3e-5)
    assert waste(plan, problem) == pytest.approx(0, abs=1e-9)
    check(plan, problem)
    if len(speeds) == 1:
        timing = simulate(plan, problem)
        assert timing.busy.max() == pytest.approx(timing.busy.min())


def test_balance_over_the_batch_is_not_enough():
    problem = large_problem()
    for planner, least in (("paper", 0.15), ("joint", 0.1)):
        plan = solve(problem, planner)
        assert waste(plan, problem) > least
        assert simulate(plan, problem).idle.max() > least / (1 + least)


@pytest.mark.parametrize("forward_cost", [1 / 3, 0.3541, 0.3609])
def test_small_problems_with_any_cost_are_proved_at_once(forward_cost):
    for seed in range(4):
        scores = np.random.default_rng(seed).lognormal(0, 1, (2, 5, 6, 4))
        options = {"rank": in_order(6, 4, 2), "compute_budget": 0.6, "forward_cost": forward_cost}
        plan = solve(pose_flat(*scores, **options), "makespan")
        assert plan.status == "optimal"
        assert plan.gap <= 3e-5


def test_without_time_the_prices_give_a_plan():
    for stages in (1, 4):
        problem = large_problem(stages)
        late, proved = solve(problem, "makespan", time_limit_seconds=1e-9), solve(problem, "makespan")
        assert late.objective <= proved.bound * (1 + 1e-9)
        assert late.bound >= proved.objective
        assert late.gap < 0.3
        check(late, problem)


def test_ranks_with_unlike_numbers_of_heads_are_refused_for_lock_step():
    rank = in_order(2, 4, 2)
    rank[1, 0] = 1
    problem = pose_flat(np.ones((2, 2, 4)), np.ones((2, 2, 4)), rank=rank, compute_budget=0.5)
    for planner in ("makespan", "static"):
        with pytest.raises(PlanError, match=r"equally many heads on every rank in every block.*from 1 to 3"):
            solve(problem, planner)


@pytest.mark.parametrize(
    ("planner", "options", "message"),
    [
        ("makespan", {"time_limit_seconds": 0}, "time_limit_seconds .* got 0"),
        ("makespan", {"most_shortcut": -0.1}, "most_shortcut .* got -0.1"),
        ("static", {"most_shortcut": 1.1}, "most_shortcut .* got 1.1"),
        ("depth", {"time_limit_seconds": -1}, "time_limit_seconds .* got -1"),
    ],
)
def test_options_out_of_range_are_named(planner, options, message):
    with pytest.raises(PlanError, match=message):
        solve(large_problem(), planner, **options)


def test_an_infeasible_budget_names_the_device_and_the_least_feasible_one():
    scores = np.ones((2, 2, 2, 4))
    speeds = {"rank": in_order(2, 4, 2), "device_speed": [1.0, 0.5]}
    with pytest.raises(
        PlanError, match=r"compute budget of rank 1 .*most_shortcut.*least feasible .* is 0\.3334"
    ):
        solve(pose_flat(*scores, compute_budget=0.4, **speeds), "makespan", most_shortcut=0.0)
    with pytest.raises(
        PlanError, match=r"compute budget of rank 1 .*FORWARD_ONLY.*least feasible .* is 0\.3334"
    ):
        solve(pose_flat(*scores, compute_budget=0.4, **speeds), "depth")
    with pytest.raises(PlanError, match=r"communication budget of rank 0 .*least feasible .* is 0\.5"):
        solve(
            pose_flat(*scores, compute_budget=0.4, communication_budget=0.4),
            "static",
            most_shortcut=0.0,
        )


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 99999), st.integers(1, 3), st.booleans())
def test_choose_finds_the_best_choice(seed, number_of_limits, shared_groups):
    generator = np.random.default_rng(seed)
    classes, options = generator.integers(1, 6), generator.integers(2, 5)
    value = generator.choice(
        [generator.normal(0, 1, (classes, options)), generator.integers(0, 3, (classes, options))]
    )
    value = value.astype(float)
    limits = []
    group = generator.integers(0, 2, classes)
    for _ in range(number_of_limits):
        use = generator.choice(
            [generator.uniform(0, 2, options), generator.integers(0, 4, options).astype(float)]
        )
        use[0] = 0
        its_group = group if shared_groups else generator.integers(0, 2, classes)
        limits.append(Limit(use, its_group, generator.uniform(0, 2 * classes, 2)))
    best = max(
        value[np.arange(classes), list(choice)].sum()
        for choice in itertools.product(range(options), repeat=classes)
        if all((limit.used(np.array(choice)) <= limit.most + 1e-12).all() for limit in limits)
    )
    found = choose(value, limits, deadline=math.inf)
    assert all((limit.used(found.option) <= limit.most + 1e-9).all() for limit in limits)
    assert found.value == pytest.approx(value[np.arange(classes), found.option].sum())
    assert found.value == pytest.approx(best, rel=4e-5, abs=1e-6)
    assert found.bound >= best - 1e-9


def test_a_pipeline_takes_turns():
    one = np.ones((3, 4))
    assert pipeline_time(one, 2 * one) == pytest.approx(
        3 * (4 + 2)
    )  # rows plus stages - 1 that fill and drain
    assert pipeline_time(one[:1], 2 * one[:1]) == pytest.approx(12)
    assert pipeline_time(one[:, :1], 2 * one[:, :1]) == pytest.approx(9)
    slow = one.copy()
    slow[1, 2] = 5
    assert pipeline_time(slow, 2 * one) > 3 * (4 + 2)


def test_simulated_times_are_those_of_the_slowest_rank():
    problem = large_problem(speeds=(1.0, 0.5))
    plan = solve(problem, "joint", time_limit_seconds=1.0)
    timing = simulate(plan, problem)
    forward, backward = meeting_times(problem, plan.operations[None])
    np.testing.assert_allclose(timing.forward, forward[0])
    np.testing.assert_allclose(timing.backward, backward[0])
    assert timing.step == pytest.approx(forward.sum() + backward.sum())
    np.testing.assert_allclose(timing.busy, problem.used_compute(plan) / problem.device_speed)
    np.testing.assert_allclose(timing.idle, 1 - timing.busy / timing.step)


def test_spread_heads_lose_less_in_lock_step():
    generator = np.random.default_rng(0)
    of_heads = generator.lognormal(0, 0.7, (2, 1, 24, 16))
    scores = of_heads * generator.uniform(0.9, 1.1, (2, 8, 24, 16))
    problem = pose_flat(*scores, rank=in_order(24, 16, 4), compute_budget=0.6)
    owner = spread(problem, 4)
    assert (np.sort(owner, axis=1) == in_order(24, 16, 4)).all()
    placed = dataclasses.replace(problem, rank=owner)
    free = solve(problem, "joint", time_limit_seconds=1.0).bound
    losses = [1 - solve(p, "makespan").objective / free for p in (problem, placed)]
    assert losses[1] < 0.75 * losses[0]
    with pytest.raises(PlanError, match="16 heads cannot be divided evenly over 3 ranks"):
        spread(problem, 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from([(6, 2), (6, 3), (8, 4), (4, 4), (5, 1)]))
def test_spread_gives_every_rank_one_head_of_each_group(seed, sizes):
    heads, ranks = sizes
    generator = np.random.default_rng(seed)
    forward, backward = generator.lognormal(0, 1, (2, 1, 2, heads))
    problem = pose_flat(forward, backward, compute_budget=0.5)
    owner = spread(problem, ranks)
    forward_gain, backward_gain = (gain[0] for gain in problem.gains())
    both = forward_gain + backward_gain
    for price in (np.maximum(3 * forward_gain, both), np.minimum(1.5 * backward_gain, both)):
        for block in range(2):
            dealt = owner[block, np.argsort(-price[block], kind="stable")].reshape(-1, ranks)
            assert (np.sort(dealt, axis=1) == np.arange(ranks)).all()


def test_a_slow_stage_may_run_densely_where_budgets_allow_it():
    """The time for backwards goes as far as the slowest stage's, though another has the heads that it is counted in."""
    scores = np.random.default_rng(0).lognormal(0, 1, (2, 4, 6, 4))
    problem = pose_flat(
        *scores,
        rank=np.zeros((6, 4), dtype=int),
        stage=np.repeat([0, 1], 3),
        device_speed=[1.0, 0.45],
        compute_budget=1.0,
        forward_cost=0.3,
    )
    plan = solve(problem, "makespan")
    assert (plan.operations == 2).all()
    assert plan.status == "optimal"
