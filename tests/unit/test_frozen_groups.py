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

GROUPS, FROZEN = 4, [0, 2]
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(
        optimizer, [lambda step, group=group: (group + 1) / (step + 1) for group in range(GROUPS)]
    ),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 5),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 2, 3, 4]),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, [0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4], 3),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2, 0.3, 0.4], total_steps=20),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [*(lr_scheduler.LinearLR(optimizer) for _ in range(4)), lr_scheduler.PolynomialLR(optimizer, 5)],
        [1, 2, 3, 4],
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(
        optimizer, patience=0, min_lr=[0.01, 0.02, 0.03, 0.04]
    ),
    "timm": lambda optimizer: timm.scheduler.CosineLRScheduler(optimizer, 5, warmup_t=2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_on_for_the_groups_that_stay(name: str) -> None:
    def rates(leaves_out: bool) -> list[list[float]]:
        layers = [nn.Linear(2, 2) for _ in range(GROUPS)]
        groups = [{"params": layer.parameters(), "lr": 0.1 * (i + 1)} for i, layer in enumerate(layers)]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        schedule = SCHEDULES[name](optimizer)
        if leaves_out:
            for group in FROZEN:
                layers[group].requires_grad_(False)
            assert _leave_out_frozen_groups(optimizer, schedule) == FROZEN
        seen = []
        for step in range(7):
            optimizer.step()
            schedule.step(*{"timm": [step], "ReduceLROnPlateau": [1.0]}.get(name, []))
            seen.append([group["lr"] for group in optimizer.param_groups])
        return seen

    kept = [group for group in range(GROUPS) if group not in FROZEN]
    assert rates(True) == [[step[group] for group in kept] for step in rates(False)]
