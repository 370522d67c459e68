"""The baselines' plans: their form, and that nothing more would fit into the budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning import Operation, PlanProblem, SkipPlan, check, solve
from tests.posing import pose_flat

FULL, FORWARD_ONLY, SHORTCUT = Operation.FULL, Operation.FORWARD_ONLY, Operation.SHORTCUT
NAMES = ("last_blocks", "stochastic_depth", "pruning", "routing")


def problem(
    slots: int = 5, replicas: int = 2, blocks: int = 4, heads: int = 3, budget: float = 0.6, **more: object
) -> PlanProblem:
    scores = np.random.default_rng(0).random((2, slots * replicas, blocks, heads))
    return pose_flat(*scores, replicas=replicas, compute_budget=budget, **more)


def options(name: str) -> dict[str, object]:
    return {"seed": (0, 1)} if name == "stochastic_depth" else {}


@given(st.sampled_from(NAMES), st.integers(1, 6), st.integers(1, 3), st.integers(1, 6), st.floats(0.4, 1))
def test_budgets_are_kept_and_used(name: str, slots: int, replicas: int, blocks: int, budget: float) -> None:
    posed = problem(slots, replicas, blocks, budget=budget, always_share=0.02)
    plan = solve(posed, name, **options(name))
    check(plan, posed)
    slack = posed.budgets_to_plan[:, 0] - posed.used_compute(plan)
    # What the next step would cost: a block of 3 heads in one row, or a head in all rows. Routing drops some.
    step = {"last_blocks": 3 * 2 / 3, "stochastic_depth": 3, "pruning": slots, "routing": np.inf}[name]
    assert plan.is_dense or (slack < step + 1e-6).all()


def test_last_blocks() -> None:
    operations = solve(problem(), "last_blocks").operations
    assert (operations[:, 3] == FULL).all()
    assert (operations[:, :2] == FORWARD_ONLY).all()
    # 0.6 of 60 cells is 36; FORWARD_ONLY everywhere takes 20, a FULL row of a block 2 more: 8 of them.
    assert [(row == FULL).all() for row in operations[:, 2]] == [True] * 6 + [False] * 4
    with pytest.raises(PlanError, match="compute budget"):
        solve(problem(budget=0.3), "last_blocks")


def test_stochastic_depth_skips_whole_blocks_evenly_and_draws_by_seed() -> None:
    plan = solve(problem(), "stochastic_depth", seed=(0, 0))
    whole = plan.operations.reshape(10, 4, 3)
    assert ((whole == FULL).all(-1) | (whole == SHORTCUT).all(-1)).all()
    for replica in range(2):
        counts = (plan.for_replica(replica)[:, :, 0] == FULL).sum(0)
        assert counts.tolist() == [3, 3, 3, 3]
    assert plan == solve(problem(), "stochastic_depth", seed=(0, 0))
    draws = {solve(problem(), "stochastic_depth", seed=(0, draw)).hash for draw in range(5)}
    assert len(draws) == 5
    assert solve(problem(), "random", seed=(0, 0)) != solve(problem(), "random", seed=(0, 1))


def test_pruning_keeps_the_subnets_with_the_largest_scores() -> None:
    posed = problem()
    operations = solve(posed, "pruning").operations
    assert (operations == operations[0]).all()
    total = posed.backward_score.sum(0)
    kept = operations[0] == FULL
    assert kept.sum() == 7  # of 12
    assert total[kept].min() > total[~kept].max()
    assert (operations[0][~kept] == SHORTCUT).all()


def test_routing_sends_rows_to_their_best_heads_within_capacity() -> None:
    posed = problem(budget=1 / 3 + 1e-6)
    operations = solve(posed, "routing", capacity_factor=100).operations
    best = posed.forward_score.argmax(-1)
    assert ((operations == FULL).sum(-1) == 1).all()
    assert (np.take_along_axis(operations, best[:, :, None], -1) == FULL).all()
    tight = solve(posed, "routing", capacity_factor=1).operations  # 5 rows, 3 heads: 2 rows a head at most
    for replica in range(2):
        mine, wanted = tight[replica::2] == FULL, best[replica::2]
        assert mine.sum(0).max() <= 2
        for block in range(4):
            for head in range(3):
                rows = np.flatnonzero(wanted[:, block] == head)
                assert np.flatnonzero(mine[:, block, head]).tolist() == rows[:2].tolist()
    with pytest.raises(PlanError, match="capacity_factor"):
        solve(posed, "routing", capacity_factor=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_budget_is_dense(name: str) -> None:
    more = {"capacity_factor": 100} if name == "routing" else options(name)
    assert solve(problem(budget=1), name, **more) == SkipPlan.dense(5, 2, 4, 3)
