"""Learning rates of heads by their share of FULL micro-batches."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from d2ft_hpc.config import OptimizerConfig
from d2ft_hpc.engines.optimizer import build_optimizer, build_schedule
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.execution.executor import attach
from d2ft_hpc.planning import SkipPlan
from tests.models import DEPTH, HEADS, random_batch, tiny_vit
from tests.reference import FORWARD_ONLY, FULL


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_each_heads_step_is_that_of_its_own_learning_rate(name: str) -> None:
    """Against engines whose whole learning rate is multiplied, head by head, over one step."""
    rows = np.random.default_rng(2).choice([FORWARD_ONLY, FULL], (4, DEPTH, HEADS)).astype(np.uint8)
    rows[:, 0, 0], rows[:, 0, 1] = FORWARD_ONLY, FULL
    start = tiny_vit()

    def after_a_step(learning_rate: float, exponent: float) -> torch.nn.Module:
        model = copy.deepcopy(start)
        executor = attach(model)
        config = OptimizerConfig(
            name=name, learning_rate=learning_rate, weight_decay=0.1, schedule="constant"
        )
        optimizer = build_optimizer(model, config)
        engine = PlainEngine(
            model,
            executor,
            optimizer,
            build_schedule(optimizer, config, 1),
            F.cross_entropy,
            few_full_exponent=exponent,
        )
        executor.activate(SkipPlan(rows, replicas=1), 0)
        engine.step([random_batch(slot) for slot in range(len(rows))])
        return model

    subnets = attach(copy.deepcopy(start)).subnets
    ours = after_a_step(1e-2, 0.5)
    share = (rows == FULL).mean(axis=0)
    owned = set()
    for factor in np.unique(share):
        expected = dict(after_a_step(1e-2 * factor**0.5 if factor else 1e-30, 0.0).named_parameters())
        for block, inner, parameter in subnets.parameters(ours):
            axis = subnets.head_axes[inner]
            owned.add(f"blocks.{block}.{inner}")
            difference = axis.sum_by_head((parameter - expected[f"blocks.{block}.{inner}"]).abs())
            of_this_factor = difference.detach().numpy()[share[block] == factor]
            assert (of_this_factor <= 1e-4).all()
    plain = dict(after_a_step(1e-2, 0.0).named_parameters())
    for key, parameter in ours.named_parameters():
        assert key in owned or torch.equal(parameter, plain[key]), key
