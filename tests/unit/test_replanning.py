"""When a plan is due."""

from __future__ import annotations

import pytest

from d2ft_hpc.config import PlanConfig, ReplanConfig
from d2ft_hpc.training.plans import is_due


@pytest.mark.parametrize(
    ("replan", "due"),
    [
        (ReplanConfig(), [0]),
        (ReplanConfig(every=1), [0, 3, 6, 9]),
        (ReplanConfig(every=2), [0, 6]),
        (ReplanConfig(every=4, unit="steps"), [0, 4, 8]),
    ],
)
def test_plans_are_due_at_the_start_and_every_k_epochs_or_steps(replan: ReplanConfig, due: list[int]) -> None:
    config = PlanConfig(replan=replan)
    steps = [
        step for step in range(12) if is_due(config, epoch=step // 3, step_of_epoch=step % 3, steps_done=step)
    ]
    assert steps == due
