"""What plans claim, against an oracle: budgets, demands, optima, bounds, gaps and statuses, for every kind of instance
and every planner."""

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest

from d2ft_hpc.planning import PlanProblem, SkipPlan, check, highs, in_order, solve
from d2ft_hpc.planning.table import PLANNERS
from tests import plan_oracle
from tests.plan_oracle import FACTORS, FIELDS, draw, faults
from tests.posing import pose_flat

SEEDS = range(96)
FEW_AND_ALL = [pytest.param(SEEDS[::4], id="few"), pytest.param(SEEDS, id="all", marks=pytest.mark.full)]
NEEDED: dict[str, dict] = {"random": {"seed": 1}, "stochastic_depth": {"seed": 1}}


def test_the_oracle_knows_every_field_planner_and_option():
    """A new one has to be drawn and judged in `plan_oracle` before this passes."""
    assert {field.name for field in dataclasses.fields(PlanProblem)} == set(FIELDS)
    assert {factor for factors in FIELDS.values() for factor in factors} | {"most_shortcut"} == set(FACTORS)
    options = {name: set(entry.parameters) for name, entry in PLANNERS.items() if entry.plans_heads}
    assert options == plan_oracle.PLANNERS


def test_every_pair_of_kinds_is_drawn():
    kinds = {
        "replicas": lambda value: value,
        "ranks": lambda value: value,
        "stages": lambda value: value,
        "speeds": lambda value: value == (1.0,),
        "replicas_meet": lambda value: value,
        "messages": lambda value: value,
        "token_layout": lambda value: value,
        "compute_budget": lambda value: value < 1,
        "communication_budget": lambda value: value is None,
        "memory_budget": lambda value: value is None,
        "unlike_budgets": lambda value: value,
        "most_shortcut": lambda value: value < 1,
    }
    drawn = [draw(seed).drawn for seed in SEEDS]
    for one, other in itertools.combinations(kinds, 2):
        seen = {(kinds[one](each[one]), kinds[other](each[other])) for each in drawn}
        all_of = [{kinds[name](value) for value in FACTORS[name]} for name in (one, other)]
        assert seen == set(itertools.product(*all_of)), (one, other)


@pytest.mark.parametrize("seeds", FEW_AND_ALL)
@pytest.mark.parametrize(
    "planner", [name for name, entry in PLANNERS.items() if entry.keeps_budgets and entry.binding == "slot"]
)
def test_plans_are_what_they_claim(planner, seeds):
    wrong = {}
    for seed in seeds:
        options = dict(NEEDED.get(planner, {}))
        found = faults(draw(seed), planner, solve, **options)
        if found:
            wrong[seed] = found
    assert not wrong


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 8))]
)
def test_the_oracle_finds_what_trying_all_plans_finds(seed):
    instance = draw(
        seed, shape=(2, 2, 2), replicas=1, ranks=[1, 2][seed % 2], messages="by_head", owner="even"
    )
    best = -math.inf
    for choice in itertools.product((0, 1, 2), repeat=8):
        operations = np.array(choice, dtype=np.uint8).reshape(2, 2, 2)
        if plan_oracle.keeps_budgets(instance.problem, operations) and plan_oracle.keeps_demands(
            instance, operations
        ):
            best = max(best, plan_oracle.score(instance, operations))
    found = plan_oracle.best_of_all(instance)
    assert found is None if best == -math.inf else found[0] == pytest.approx(best)


def lognormal(shape, **options):
    return pose_flat(*np.random.default_rng(0).lognormal(0, 1, (2, *shape)), **options)


@pytest.mark.parametrize("planner", ["makespan", "static"])
def test_almost_equal_speeds_plan_like_equal_ones(planner):
    plans = [
        solve(
            lognormal(
                (8, 12, 12),
                rank=in_order(12, 12, 2),
                compute_budget=0.8,
                communication_budget=0.5,
                device_speed=speeds,
            ),
            planner,
        )
        for speeds in ([1.0, 1.0], [1.0, 1.001])
    ]
    assert plans[0].objective == pytest.approx(plans[1].objective, rel=1e-6)
    assert {plan.status for plan in plans} == {"optimal"}


def test_a_backward_that_costs_nothing_does_not_overdraw_the_budget():
    generator = np.random.default_rng(3)
    for _ in range(40):
        forward, backward = generator.lognormal(0, 1, (2, 4, 3, 4))
        backward[generator.random(backward.shape) < 0.5] = 0.0
        problem = pose_flat(forward, backward, forward_cost=1.0, compute_budget=0.5)
        for seconds in (10.0, 1e-9):
            assert solve(problem, "joint", time_limit_seconds=seconds).objective > 0


class Clock:
    """time.monotonic() that stands still until it has been looked at so many times, and then is past any deadline."""

    def __init__(self, looks):
        self.looks_left = looks

    def __call__(self):
        self.looks_left -= 1
        return 0.0 if self.looks_left >= 0 else 1e9

    @property
    def is_late(self):
        return self.looks_left < 0


@pytest.mark.parametrize("planner", ["makespan", "joint", "depth"])
@pytest.mark.parametrize(
    "seed", [2, 43, 0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(12, 96, 12))]
)
def test_time_that_runs_out_at_any_moment_leaves_an_honest_plan(planner, seed, monkeypatch):
    """And HiGHS begins nothing after it."""
    run, wrong, looks, is_late = highs._QuietHighs.run, {}, 1, True
    while is_late:
        clock, begun_late = Clock(looks), []

        def watched(solver, clock=clock, begun_late=begun_late):
            begun_late.append(clock.is_late)
            return run(solver)

        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", clock)
            patch.setattr(highs._QuietHighs, "run", watched)
            found = faults(draw(seed), planner, solve, time_limit_seconds=1000.0)
        is_late = clock.is_late
        if found or any(begun_late):
            wrong[looks] = found, begun_late
        looks = max(looks + 1, looks * 4 // 3)
    assert not wrong


def test_a_gap_above_one_per_cent_is_said_in_words():
    operations = np.zeros((1, 1, 2), dtype=np.uint8)
    plan = SkipPlan(operations, 1, planner="joint", objective=9.0, bound=10.0, gap=0.1, status="time limit")
    assert plan.evidence == "joint, time limit, gap 10.0%: its score is 9, the best may reach 10"
    near = dataclasses.replace(plan, objective=9.95, gap=0.005, status="optimal")
    assert near.evidence == "joint, optimal, gap 5.0e-03"
    assert dataclasses.replace(plan, gap=math.nan).evidence == "joint, time limit, gap not known"


def test_little_time_is_shared_by_replicas_and_stages():
    """None is left with nothing."""
    problem = lognormal(
        (8, 8, 8),
        replicas=4,
        rank=in_order(8, 8, 2),
        stage=np.arange(8) // 4,
        compute_budget=0.6,
        communication_budget=0.6,
        memory_budget=0.5,
        device_speed=np.resize([1.0, 0.8, 0.9], 16).tolist(),
    )
    plan = solve(problem, "makespan", time_limit_seconds=1e-6)
    check(plan, problem)
    by_replica = [(plan.operations[replica::4] == 2).sum() for replica in range(4)]
    assert min(by_replica) > 0
    assert plan.bound >= solve(problem, "makespan").objective


@pytest.mark.parametrize("seeds", FEW_AND_ALL)
@pytest.mark.parametrize("planner", ["makespan", "static"])
def test_where_nothing_can_run_nothing_is_promised(planner, seeds):
    """Neither score nor bound, and so no gap, though levels are chosen at the scale of what dense blocks are worth."""
    budgets = ("compute_budget", "communication_budget", "memory_budget")
    kept, wrong = 0, {}
    for seed in (124, 346, 381, *seeds):
        for shares in ((0.3, 0.01, 0.0), (0.1, 0.1, 0.1), (0.8, 0.05, 0.05), (0.8, None, 0.0)):
            scarce = dict(zip(budgets, shares, strict=True))
            plan = solve(draw(seed, owner="even", most_shortcut=1.0, **scarce).problem, planner)
            if not plan.operations.any():
                kept += 1
                if plan.bound > 0 or plan.gap > 0 or plan.status != "optimal":
                    wrong[seed, shares] = plan.evidence
    assert kept > len(seeds) / 2
    assert not wrong
