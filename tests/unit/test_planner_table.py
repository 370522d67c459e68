"""The table of planners: what each says of itself is so."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.planning import PLANNERS, solve
from tests.posing import pose_flat

OF_SLOTS = [name for name, entry in PLANNERS.items() if entry.binding == "slot" and entry.keeps_budgets]


def lognormal(seed: int) -> tuple[np.ndarray, np.ndarray]:
    forward, backward = np.random.default_rng(seed).lognormal(0, 1, (2, 6, 4, 4))
    return forward, backward


@pytest.mark.parametrize("name", PLANNERS)
def test_options_are_parameters_of_the_planners_function_with_the_same_defaults(name: str) -> None:
    entry = PLANNERS[name]
    parameters = inspect.signature(entry.solve).parameters
    if entry.plans_heads:
        assert {key: parameters[key].default for key in entry.options.model_fields} == (
            entry.options().model_dump()
        )
    assert all(field.description for field in entry.options.model_fields.values())
    assert entry.about in str(PlanConfig.model_fields["planner"].description)


@pytest.mark.parametrize("name", OF_SLOTS)
def test_a_planner_that_says_so_reads_no_scores(name: str) -> None:
    config = PlanConfig(planner=name)
    plans = {
        solve(pose_flat(*lognormal(seed), compute_budget=0.6), name, **config.arguments(seed=1)).hash
        for seed in range(4)
    }
    assert (len(plans) > 1) == PLANNERS[name].reads_scores


@pytest.mark.parametrize("name", [name for name, entry in PLANNERS.items() if entry.fits_memory])
def test_a_planner_that_says_so_fits_plans_into_memory(name: str) -> None:
    posed = pose_flat(*lognormal(0), compute_budget=0.6, memory_budget=0.26)  # 4 of a row's 16 cells
    plan = solve(posed, name, **PlanConfig(planner=name).arguments(seed=1))
    assert 1 <= (plan.operations == 2).sum(axis=(1, 2)).max() <= 4
