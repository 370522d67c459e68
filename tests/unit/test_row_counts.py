"""Plans by whole rows: against brute force, the ideal proportions, and what they promise beyond it."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning import RowCosts, RowCounts, solve_row_counts

VIT_S = {"rows": 320, "speed": [1.0], "block_cost": np.ones(12), "budget": 0.6}


def least_variance(weight, cost, most, budget):
    """Over all counts that keep the budget; None if there are none."""
    best = None
    for counts in itertools.combinations_with_replacement(range(1, most + 1), len(weight)):
        if cost @ np.array(counts) <= budget * (1 + 1e-9):
            value = float((weight / np.array(counts)).sum())
            best = value if best is None else min(best, value)
    return best


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_counts_within_the_budget_have_less_variance(data):
    blocks, rows = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    shares = st.floats(0.05, 1.0)
    cost = np.array(
        data.draw(st.lists(st.sampled_from([1.0, 1.0, 0.37, 2.5]), min_size=blocks, max_size=blocks))
    )
    variance = np.array(data.draw(st.lists(st.floats(0.0, 9.0), min_size=blocks, max_size=blocks)))
    speed = data.draw(st.sampled_from([[1.0], [1.0, 1.0], [1.0, 0.4]]))
    forward_share, always = data.draw(st.sampled_from([(1 / 3, 0.0), (0.35, 0.7), (0.0, 0.1)]))
    problem = {
        "rows": rows,
        "speed": speed,
        "block_cost": cost,
        "budget": data.draw(shares),
        "forward_share": forward_share,
        "always_cost": always,
        "run_share": data.draw(shares),
        "variance": variance,
    }
    try:
        plan = solve_row_counts(**problem)
    except PlanError:
        return
    costs = RowCosts(cost, forward_share, always)
    assert plan.status == "optimal"
    weight = np.maximum(variance / (variance.max() or 1.0), 1e-9)
    dense = rows * costs.dense
    if len(set(speed)) == 1:
        shares_of = [problem["budget"]] * len(speed)
    else:  # the fast one is capped at its dense step
        fast = min(1.0, 2 * problem["budget"] / 1.4)
        shares_of = [fast, 2 * problem["budget"] - fast]
    for replica, share in enumerate(shares_of):
        its_rows = int(plan.rows_run[replica])
        assert costs.used(plan)[replica] <= share * (1 + 1e-9)
        left = share * dense - its_rows * costs.run
        least = least_variance(weight, costs.backward, its_rows, left)
        assert (weight / plan.counts[replica]).sum() == pytest.approx(least, rel=1e-9)
    assert plan.bound <= plan.objective
    assert plan.gap <= 1e-7  # HiGHS keeps constraints to 1e-9 of their size


def test_the_linear_profile_is_the_accuracy_study_s_own():
    plan = solve_row_counts(**VIT_S)
    assert plan.rows_run.tolist() == [320]
    np.testing.assert_allclose(plan.counts[0] / 320, np.linspace(0.2, 0.6, 12), atol=1 / 320)
    assert plan.status == "optimal"
    assert plan.gap < 1e-6
    assert 0.5995 < float(RowCosts(np.ones(12), 1 / 3, 0.0).used(plan)[0]) <= 0.6


def test_a_flat_profile_over_fewer_rows():
    plan = solve_row_counts(**VIT_S, run_share=0.75, bottom_to_top=1.0)
    assert plan.rows_run.tolist() == [240]
    np.testing.assert_array_less(np.abs(plan.counts - 168), 2)


def test_variance_wants_its_square_root_in_rows_and_never_more_below():
    variance = np.array([9.0, 1.0, 8.0, 16.0])
    plan = solve_row_counts(rows=400, speed=[1.0], block_cost=np.ones(4), budget=0.5, variance=variance)
    pool = np.sqrt(5.0)  # the second wants fewer rows than the first, below it: they share the mean variance
    ideal = np.array([pool, pool, np.sqrt(8.0), 4.0])
    np.testing.assert_allclose(plan.counts[0], ideal / ideal.sum() * 400, atol=1)


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
def test_replicas_of_different_speed_finish_together_within_one_row(budget):
    speed = np.array([1.0, 0.5, 0.8, 1.0])
    plan = solve_row_counts(rows=64, speed=speed, block_cost=np.ones(12), budget=budget, always_cost=0.3)
    costs = RowCosts(np.ones(12), 1 / 3, 0.3)
    time = costs.used(plan) / speed
    capped = costs.used(plan) > 0.999
    one_row = costs.run / (64 * costs.dense) / speed.min()
    assert np.ptp(time[~capped]) <= one_row
    assert budget - 0.01 < costs.used(plan).mean() <= budget * (1 + 1e-9)
    assert (plan.rows_run[speed == 0.5] < plan.rows_run[speed == 1.0].min()).all()


def test_the_same_input_gives_the_same_plan_and_a_value_travels():
    plan = solve_row_counts(**VIT_S, seed=3)
    assert solve_row_counts(**VIT_S, seed=3) == plan
    assert solve_row_counts(**VIT_S, seed=4) != plan
    assert RowCounts.from_bytes(plan.to_bytes()) == plan
    with pytest.raises(ValueError, match="read-only"):
        plan.counts[0, 0] = 1
    with pytest.raises(PlanError, match="do not match their hash"):
        RowCounts.from_bytes(plan.to_bytes().replace(b'"rows": 320', b'"rows": 321'))
    with pytest.raises(PlanError, match="are no row counts"):
        RowCounts.from_bytes(b"[]")
    with pytest.raises(PlanError, match="not grow towards the first block"):
        replace(plan, counts=plan.counts[:, ::-1])


def test_many_rows_and_blocks_are_solved_near_the_bound():
    variance = np.random.default_rng(0).lognormal(0, 1, 80)
    plan = solve_row_counts(
        rows=1024,
        speed=[1, 1, 0.5],
        block_cost=np.linspace(1, 2, 80),
        budget=0.6,
        variance=variance,
        time_limit_seconds=0.5,
    )
    assert plan.gap < 1e-4


def test_an_impossible_budget_is_refused_with_one_that_works():
    with pytest.raises(
        PlanError, match=r"does not pay .* run_share 1 .* least feasible budget is about"
    ) as error:
        solve_row_counts(**VIT_S | {"budget": 0.3})
    least = float(str(error.value).split("about ")[1].split(";")[0])
    solve_row_counts(**VIT_S | {"budget": least})
    with pytest.raises(PlanError, match="budget is a share"):
        solve_row_counts(**VIT_S | {"budget": 1.5})
    with pytest.raises(PlanError, match="variance needs 12"):
        solve_row_counts(**VIT_S, variance=[1.0])
