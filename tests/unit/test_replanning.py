"""When a plan is due, and how one that is solved meanwhile comes into force."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from d2ft_hpc.config import EngineConfig
from d2ft_hpc.errors import PlanError
from d2ft_hpc.launch.control import SoloControl
from d2ft_hpc.lifecycle.background import BackgroundSolver
from d2ft_hpc.plan_config import PlanConfig, ReplanConfig
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.training.plan_context import is_due, meets_every_block


@pytest.mark.parametrize(
    ("replan", "due"),
    [
        (ReplanConfig(), [0]),
        (ReplanConfig(every="1 epoch"), [0, 3, 6, 9]),
        (ReplanConfig(every="2 epochs"), [0, 6]),
        (ReplanConfig(every="4 steps"), [0, 4, 8]),
    ],
)
def test_plans_are_due_at_the_start_and_every_k_epochs_or_steps(replan: ReplanConfig, due: list[int]) -> None:
    config = PlanConfig(replan=replan)
    steps = [
        step for step in range(12) if is_due(config, epoch=step // 3, step_of_epoch=step % 3, steps_done=step)
    ]
    assert steps == due


def test_replicas_meet_in_every_block_under_zero_3_alone() -> None:
    for stage in range(4):
        engine = EngineConfig(deepspeed={"zero_optimization": {"stage": stage}})
        assert meets_every_block(engine) == (stage == 3)
    assert not meets_every_block(EngineConfig())
    assert not meets_every_block(EngineConfig(name="plain"))


def a_plan(value: int) -> SkipPlan:
    return SkipPlan(np.full((2, 1, 1), value, dtype=np.uint8), 1)


def test_a_plan_comes_into_force_at_the_boundary_after_it_is_solved() -> None:
    solver, may_end = BackgroundSolver(SoloControl()), threading.Event()

    def solve() -> SkipPlan:
        assert may_end.wait(10)
        return a_plan(1)

    assert solver.at_boundary() is None
    assert solver.start(solve)
    assert solver.at_boundary() is None
    assert not solver.start(lambda: a_plan(2))  # the late plan is used later, and no other begun
    may_end.set()
    made = solver.at_boundary(wait=True)
    assert made is not None
    assert made.plan == a_plan(1)
    assert solver.at_boundary() is None
    assert solver.start(lambda: a_plan(2))
    made = solver.at_boundary(wait=True)
    assert made is not None
    assert made.plan == a_plan(2)


def test_an_impossible_budget_leaves_the_old_plan_and_a_bug_does_not_pass() -> None:
    def impossible() -> SkipPlan:
        raise PlanError("the budget does not pay for it")

    def bug() -> SkipPlan:
        raise ZeroDivisionError

    solver = BackgroundSolver(SoloControl())
    solver.start(impossible)
    made = solver.at_boundary(wait=True)
    assert made is not None
    assert made.plan is None
    assert made.fault == "the budget does not pay for it"
    solver.start(bug)
    with pytest.raises(ZeroDivisionError):
        solver.at_boundary(wait=True)
