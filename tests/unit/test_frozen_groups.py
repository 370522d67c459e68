"""Optimisers with groups that are frozen as a whole, under ZeRO: the others keep their learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm.scheduler
import torch
from torch import nn
from torch.optim import lr_scheduler

from d2ft_hpc.user_loop.initialize import _leave_out_frozen_groups

SCHEDULES: dict[str, Callable[[Any, int], Any]] = {
    "LambdaLR": lambda optimizer, groups: lr_scheduler.LambdaLR(
        optimizer, [lambda step, group=group: (group + 1) / (step + 1) for group in range(groups)]
    ),
    "CosineAnnealingLR": lambda optimizer, groups: lr_scheduler.CosineAnnealingLR(optimizer, 5),
    "MultiStepLR": lambda optimizer, groups: lr_scheduler.MultiStepLR(optimizer, times(groups)),
    "CyclicLR": lambda optimizer, groups: lr_scheduler.CyclicLR(
        optimizer, [0.1 * time for time in times(groups)], [1.0 * time for time in times(groups)], 3
    ),
    "OneCycleLR": lambda optimizer, groups: lr_scheduler.OneCycleLR(
        optimizer, [0.1 * time for time in times(groups)], total_steps=20
    ),
    "OneCycleLR of three phases": lambda optimizer, groups: lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=10, three_phase=True
    ),
    "SequentialLR": lambda optimizer, groups: lr_scheduler.SequentialLR(
        optimizer,
        [
            *(lr_scheduler.LinearLR(optimizer) for _ in range(groups)),
            lr_scheduler.PolynomialLR(optimizer, 5),
        ],
        times(groups),
    ),
    "ChainedScheduler": lambda optimizer, groups: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "ReduceLROnPlateau": lambda optimizer, groups: lr_scheduler.ReduceLROnPlateau(
        optimizer, patience=0, min_lr=[0.01 * time for time in times(groups)]
    ),
    "timm": lambda optimizer, groups: timm.scheduler.CosineLRScheduler(optimizer, 5, warmup_t=2),
    "timm by milestones": lambda optimizer, groups: timm.scheduler.MultiStepLRScheduler(
        optimizer, times(groups), decay_rate=0.5, warmup_t=1
    ),
    "timm with noise": lambda optimizer, groups: timm.scheduler.CosineLRScheduler(
        optimizer, 9, noise_range_t=[2, 5]
    ),
}


def times(count: int) -> list[int]:
    return list(range(1, count + 1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("groups", "frozen"), [(2, [0]), (3, [0, 2]), (4, [0, 2])])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_on_for_the_groups_that_stay(name: str, groups: int, frozen: list[int]) -> None:
    def rates(leaves_out: bool) -> list[list[float]]:
        layers = [nn.Linear(2, 2) for _ in range(groups)]
        own = [{"params": layer.parameters(), "lr": 0.1 * (i + 1)} for i, layer in enumerate(layers)]
        optimizer = torch.optim.SGD(own, lr=0.1, momentum=0.9)
        schedule = SCHEDULES[name](optimizer, groups)
        if leaves_out:
            for group in frozen:
                layers[group].requires_grad_(False)
            assert _leave_out_frozen_groups(optimizer, schedule) == frozen
        seen = []
        for step in range(7):
            optimizer.step()
            schedule.step(*{"timm": [step], "ReduceLROnPlateau": [1.0]}.get(name.split()[0], []))
            seen.append([group["lr"] for group in optimizer.param_groups])
        return seen

    kept = [group for group in range(groups) if group not in frozen]
    assert rates(True) == [[step[group] for group in kept] for step in rates(False)]
