"""Planning for many replicas: what is solved, counted and sent grows with what differs, not with their number."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from d2ft_hpc.lifecycle import PlanContext, PlanCosts, make_plan
from d2ft_hpc.lifecycle.context import DIFFERENT_REPLICAS
from d2ft_hpc.lifecycle.make_plan import _problem as problem_of
from d2ft_hpc.metering import StepCosts
from d2ft_hpc.parallel.rank_layout import Placement
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.planning import PlanProblem, SkipPlan, solve
from d2ft_hpc.scores import Scores
from tests.posing import pose_flat

SLOTS, BLOCKS, HEADS = 2, 4, 3
PLANNERS = ["static", "joint", "makespan"]


def context_of(planner: str, replicas: int, speeds: list[float] | None = None) -> PlanContext:
    costs = StepCosts(
        10.0, np.full(BLOCKS, 3.0), np.full(BLOCKS, 1.0), np.full(BLOCKS, HEADS), np.ones(BLOCKS, dtype=bool)
    )
    return PlanContext(
        PlanConfig(planner=planner, compute_budget=0.6),
        Placement.whole(replicas, 0, BLOCKS, HEADS),
        costs,
        PlanCosts.counted(costs, speeds, replicas),
        slots=SLOTS,
        micro_batch_size=8,
    )


def scores_of(replicas: int) -> Scores:
    forward, backward = np.random.default_rng(0).lognormal(size=(2, SLOTS * replicas, BLOCKS, HEADS))
    return Scores(forward.astype(np.float32), backward.astype(np.float32), seconds=0.0)


def test_replicas_of_one_speed_follow_the_rows_of_a_few_in_turn() -> None:
    """1,024 replicas pose the problem of eight, by the mean scores of those that share rows."""
    context, scores = context_of("joint", 1024), scores_of(1024)
    assert DIFFERENT_REPLICAS == 8
    assert np.array_equal(context.followed, np.arange(1024) % 8)
    problem = problem_of(context, scores, np.ones(BLOCKS, dtype=bool), compute_budget=0.6).of_followed(
        context.followed
    )
    assert problem.forward_score.shape == (SLOTS * 8, BLOCKS, HEADS)
    of_slot_1 = scores.forward.astype(np.float64)[1024:]
    assert np.allclose(problem.forward_score[8 + 3], of_slot_1[3::8].mean(axis=0), rtol=1e-12)

    plan, few = make_plan(context, scores, 0), solve(problem, "joint")
    assert (plan.replicas, plan.num_rows) == (1024, SLOTS * 1024)
    for replica in (0, 7, 8, 1023):
        assert np.array_equal(plan.for_replica(replica), few.for_replica(replica % 8))
    # Shared rows are the best for mean scores, not for each replica's own.
    assert few.gap == few.gap
    assert plan.gap != plan.gap
    assert plan.status == f"{few.status} for 8 replicas, whose rows the others share"


def test_a_number_of_replicas_that_eight_does_not_divide_is_planned_as_well() -> None:
    plan = make_plan(context_of("joint", 11), scores_of(11), 0)
    assert [np.array_equal(plan.for_replica(8 + each), plan.for_replica(each)) for each in range(3)] == [
        True
    ] * 3


def test_replicas_of_each_speed_follow_eight_of_their_own_and_keep_their_budgets() -> None:
    """Every third of 30 replicas is half as fast."""
    speeds = [0.5 if each % 3 == 0 else 1.0 for each in range(30)]
    context, scores = context_of("joint", 30, speeds), scores_of(30)
    followed = context.followed
    assert followed[[0, 3, 21, 24, 27]].tolist() == [0, 3, 21, 0, 3]
    assert followed[[1, 2, 11, 13, 14, 29]].tolist() == [1, 2, 11, 1, 2, 5]
    everything = problem_of(context, scores, np.ones(BLOCKS, dtype=bool), compute_budget=0.6)
    problem = everything.of_followed(followed)
    leaders = np.unique(followed)
    assert len(leaders) == problem.replicas == 16
    assert np.array_equal(problem.compute_budget, everything.compute_budget[leaders])
    assert problem.device_names[-1] == f"rank {leaders[-1]}"
    place = leaders.tolist().index(3)
    assert np.allclose(problem.forward_score[place], scores.forward[[3, 27]].mean(axis=0))
    plan = make_plan(context, scores, 0)
    assert all(
        np.array_equal(plan.for_replica(each), plan.for_replica(whose)) for each, whose in enumerate(followed)
    )
    full = [int((plan.for_replica(each) == 2).sum()) for each in range(30)]
    assert max(full[::3]) < min(full[1::3])


def test_replicas_of_unlike_memory_keep_rows_of_their_own_and_others_share_one() -> None:
    equal = context_of("joint", 12)
    short = replace(equal.reckoned, most_full=[12.0] * 11 + [6.0])
    assert replace(equal, reckoned=short).followed.tolist() == [*range(8), 0, 1, 2, 11]
    assert replace(equal, same_rows=True).followed.tolist() == [0] * 12
    assert context_of("joint", 3, [1.0, 2.0, 3.0]).followed.tolist() == [0, 1, 2]


def test_a_plan_for_many_replicas_is_hardly_a_larger_message() -> None:
    """4,096 replicas' rows take 2 bits an entry, as bytes; as a message from rank 0 hardly more than one node's."""
    plans = {each: make_plan(context_of("static", each), scores_of(each), 0) for each in (8, 4096)}
    messages = {each: len(plan.to_message()) for each, plan in plans.items()}
    assert len(plans[4096].to_bytes()) > SLOTS * 4096 * BLOCKS * HEADS / 4
    assert messages[4096] < 2 * messages[8]
    assert SkipPlan.from_message(plans[4096].to_message()) == plans[4096]


@pytest.mark.parametrize("planner", PLANNERS)
def test_what_is_computed_of_the_whole_problem_is_not_computed_for_every_replica(
    planner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gains and budgets, whose cost grows with the number of replicas, are computed equally often for 2 and for 32."""
    counts = dict.fromkeys(("gains", "budgets"), 0)

    def counted(name: str) -> None:
        own = getattr(PlanProblem, name)

        def counting(problem: PlanProblem, *arguments: float) -> object:
            counts[name] += 1
            return own(problem, *arguments)

        monkeypatch.setattr(PlanProblem, name, counting)

    for name in counts:
        counted(name)
    seen = []
    for replicas in (2, 32):
        counts.update(gains=0, budgets=0)
        scores = scores_of(replicas)
        solve(
            pose_flat(scores.forward, scores.backward, replicas=replicas, compute_budget=0.6),
            planner,
        )
        seen.append(dict(counts))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("planner", [*PLANNERS, "paper"])
def test_every_replica_gets_the_plan_that_it_would_get_alone(planner: str) -> None:
    """Equal means, so that both normalise scores alike."""
    scores = scores_of(3)
    forward, backward = (values.astype(np.float64).reshape(SLOTS, 3, BLOCKS, HEADS) for values in (
        scores.forward, scores.backward))  # fmt: skip
    forward, backward = (each / each.mean(axis=(0, 2, 3), keepdims=True) for each in (forward, backward))
    together = solve(
        pose_flat(
            forward.reshape(-1, BLOCKS, HEADS),
            backward.reshape(-1, BLOCKS, HEADS),
            replicas=3,
            compute_budget=0.6,
        ),
        planner,
    )
    for each in range(3):
        alone = solve(pose_flat(forward[:, each], backward[:, each], compute_budget=0.6), planner)
        assert np.array_equal(together.for_replica(each), alone.operations)
