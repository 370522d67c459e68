"""A step in which memory runs out is forgotten and repeated under a plan with less: as if it had never begun."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from d2ft_hpc.config import ConfigError, load_config
from d2ft_hpc.engines.engine import MemoryShortError
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.errors import PlanError
from d2ft_hpc.execution.executor import attach
from d2ft_hpc.lifecycle.costs import PlanCosts, with_less_memory
from d2ft_hpc.metering.memory import activation_limit
from d2ft_hpc.planning import Operation, PlanProblem, SkipPlan, solve
from tests.models import DEPTH, HEADS, tiny_vit

SLOTS = 2


def engine_and_weights(model):
    executor = attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return PlainEngine(model, executor, optimizer, schedule, F.cross_entropy)


def batch():
    generator = torch.Generator().manual_seed(0)
    size = tiny_vit().patch_embed.img_size[0]
    return [(torch.randn(4, 3, size, size, generator=generator), torch.arange(4) % 3) for _ in range(SLOTS)]


def plan_of(full_heads):
    operations = np.full((SLOTS, DEPTH, HEADS), Operation.FORWARD_ONLY, np.uint8)
    operations[:, :, :full_heads] = Operation.FULL
    return SkipPlan(operations, 1)


def kept_bytes(plan):
    """What autograd keeps for a micro-batch under the plan."""
    model = tiny_vit(proj_drop_rate=0.2)
    executor = attach(model)
    executor.activate(plan, 0)
    kept = []

    def pack(tensor):
        kept.append(tensor.nbytes)
        return tensor

    images, labels = batch()[0]
    with executor.micro_batch(0), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.cross_entropy(model(images), labels)
    return sum(kept)


def test_a_step_that_ran_out_of_memory_changes_nothing():
    full, less = plan_of(HEADS), plan_of(1)
    limit = kept_bytes(less)
    assert limit < kept_bytes(full)  # what is not FULL keeps nothing

    torch.manual_seed(0)
    once = tiny_vit(proj_drop_rate=0.2)
    engine = engine_and_weights(once)
    engine.executor.activate(less, 0)
    torch.manual_seed(1)
    engine.step(batch())

    torch.manual_seed(0)
    repeated = tiny_vit(proj_drop_rate=0.2)
    engine = engine_and_weights(repeated)
    engine.short_of_memory = lambda is_short: (0,) if is_short else ()
    engine.executor.activate(full, 0)
    torch.manual_seed(1)
    with activation_limit(limit):
        with pytest.raises(MemoryShortError, match="ranks 0"):
            engine.step(batch())
        engine.executor.activate(less, 0)
        engine.step(batch())
    for own, other in zip(once.parameters(), repeated.parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_limit_that_nothing_exceeds_is_free_again_after_every_backward():
    model = torch.nn.Linear(100, 100)
    with activation_limit(3 * 4 * 100 * 100):
        for _ in range(5):
            model(torch.ones(100, 100, requires_grad=True)).sum().backward()
        four_times = torch.nn.Sequential(model, model, model, model)
        with pytest.raises(torch.OutOfMemoryError, match="allowed are 120000"):
            four_times(torch.ones(100, 100, requires_grad=True))


def test_a_rank_short_of_memory_is_planned_less_and_the_others_as_before():
    scores = np.exp(np.random.default_rng(0).standard_normal((2, 2 * SLOTS, DEPTH, HEADS)))
    costs = PlanCosts(0.4, 0.1, [1.0, 1.0], "flops")

    def solved(costs):
        problem = PlanProblem.parallel(
            *scores, replicas=2, compute_budget=0.8, forward_cost=0.4, most_full=costs.most_full
        )
        return solve(problem, "joint")

    def most_full(plan, rank):
        return (plan.for_replica(rank) == Operation.FULL).sum(axis=(1, 2)).max()

    first = solved(costs)
    trains = np.ones(DEPTH, bool)
    costs = with_less_memory(costs, first, [1], trains)
    second = solved(costs)
    assert costs.most_full[0] == math.inf
    assert most_full(second, 1) <= costs.most_full[1] < most_full(first, 1)
    np.testing.assert_array_equal(first.for_replica(0), second.for_replica(0))
    with pytest.raises(PlanError, match="rank 0 runs out of memory although no head"):
        with_less_memory(costs, SkipPlan(np.ones((2 * SLOTS, DEPTH, HEADS), np.uint8), 2), [0], trains)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["plan.planner=paper"], "planner paper cannot plan a rank less memory"),
        (["engine.pipeline_stages=2"], "engine.pipeline_stages=2: ranks exchange messages"),
        (['engine.deepspeed={"zero_optimization":{"stage":2}}'], "stage=2"),
    ],
)
def test_engines_that_cannot_repeat_a_step_are_refused(overrides, fault):
    from pathlib import Path

    with pytest.raises(ConfigError, match=fault):
        load_config(
            Path("configs/demo.yaml"),
            ["engine.repeat_out_of_memory=true", "plan.planner=joint", *overrides],
        )
