"""Scores against gradients taken by plain autograd, and what a probe leaves behind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ft_hpc.execution.attach import attach
from d2ft_hpc.metering.memory import kept_bytes
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.planning.plan import SkipPlan
from d2ft_hpc.score_table import WEIGHT_MAGNITUDE
from d2ft_hpc.scores import gradient_scores, scores_of_weights
from tests.memory_limit import activation_limit
from tests.models import DEPTH, HEADS, random_batch, tiny_vit

OF_PARAMETER = {
    "fisher": lambda weight: weight.grad.square(),
    "gradient_magnitude": lambda weight: weight.grad.abs(),
    "taylor": lambda weight: (weight * weight.grad).detach().abs(),
}


def by_autograd(score: str, model: nn.Module, subnets: SubnetMap, images: Tensor, labels: Tensor) -> Tensor:
    model = copy.deepcopy(model).eval()
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    scores = torch.zeros(subnets.shape)
    for block, name, parameter in subnets.parameters(model):
        scores[block] += subnets.head_axes[name].sum_by_head(OF_PARAMETER[score](parameter))
    return scores


def test_samples_are_scored_in_parts_where_memory_is_short() -> None:
    model = tiny_vit()
    subnets = SubnetMap.of(model)
    images, labels = random_batch(0, 7)
    tried = []

    def loss_function(logits: Tensor, targets: Tensor) -> Tensor:
        tried.append(len(targets))
        return F.cross_entropy(logits, targets)

    def scores() -> dict:
        return gradient_scores(model, subnets, images, labels, loss_function, ("fisher", "taylor"))

    whole = scores()
    kept = kept_bytes(lambda: model(images), [])
    with activation_limit(0.8 * kept):
        in_parts = scores()
    assert tried[0] == sum(tried[1:]) == 7
    assert len(tried) > 2, "the limit was not reached"
    for name, expected in whole.items():
        torch.testing.assert_close(in_parts[name], expected, rtol=1e-4, atol=1e-9)
    with pytest.raises(torch.OutOfMemoryError), activation_limit(kept / 100):
        scores()


@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": False, "proj_bias": False, "init_values": 0.1, "qk_norm": True}]
)
def test_scores_are_those_of_autograds_gradients(
    options: dict[str, object],
) -> None:
    model = tiny_vit(drop_path_rate=0.3, **options)
    subnets = SubnetMap.of(model)
    images, labels = random_batch(0)
    of_batch = gradient_scores(model, subnets, images, labels, F.cross_entropy, OF_PARAMETER)
    for score in OF_PARAMETER:
        expected = by_autograd(score, model, subnets, images, labels)
        torch.testing.assert_close(of_batch[score][0], expected, rtol=1e-4, atol=1e-9)


def test_scores_under_autocast_are_near_those_without() -> None:
    model = tiny_vit()
    subnets = SubnetMap.of(model)
    images, labels = random_batch(0)
    exact = gradient_scores(model, subnets, images, labels, F.cross_entropy, OF_PARAMETER)
    near = gradient_scores(model, subnets, images, labels, F.cross_entropy, OF_PARAMETER, torch.bfloat16)
    for score in OF_PARAMETER:
        assert not torch.equal(near[score], exact[score])
        torch.testing.assert_close(near[score], exact[score], rtol=0.1, atol=1e-6)


def test_a_probe_leaves_model_gradients_and_random_state_as_they_were() -> None:
    model = tiny_vit(proj_drop_rate=0.2)
    executor = attach(model)
    executor.activate(SkipPlan.dense(1, 1, DEPTH, HEADS), replica=0)
    model.train()
    model.blocks[1].eval()
    images, labels = random_batch(0)
    with executor.micro_batch(0):
        F.cross_entropy(model(images), labels).backward()
    fired = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: fired.append(parameter))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    state = torch.get_rng_state()
    gradient_scores(model, executor.subnets, images, labels, F.cross_entropy, ["fisher"])
    scores_of_weights(WEIGHT_MAGNITUDE, model, executor.subnets)
    assert not fired
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])


def test_fisher_of_a_frozen_model() -> None:
    model = tiny_vit()
    subnets = SubnetMap.of(model)
    images, labels = random_batch(0)
    expected = gradient_scores(model, subnets, images, labels, F.cross_entropy, ["fisher"])
    model.requires_grad_(False)
    frozen = gradient_scores(model, subnets, images, labels, F.cross_entropy, ["fisher"])
    torch.testing.assert_close(frozen, expected)


def test_weight_magnitude_sums_to_the_l1_norm() -> None:
    model = tiny_vit()
    subnets = SubnetMap.of(model)
    scores = scores_of_weights(WEIGHT_MAGNITUDE, model, subnets)
    for block in range(DEPTH):
        norms = [p.detach().abs().sum() for b, _, p in subnets.parameters(model) if b == block]
        torch.testing.assert_close(scores[block].sum(), torch.stack(norms).sum())
    with torch.no_grad():
        model.blocks[2].attn.proj.weight[:, 16:32] *= 3
    changed = (scores_of_weights(WEIGHT_MAGNITUDE, model, subnets) != scores).nonzero().tolist()
    assert changed == [[2, 1]]


def test_a_limit_that_nothing_exceeds_is_free_again_after_every_backward():
    model = torch.nn.Linear(100, 100)
    with activation_limit(3 * 4 * 100 * 100):
        for _ in range(5):
            model(torch.ones(100, 100, requires_grad=True)).sum().backward()
        four_times = torch.nn.Sequential(model, model, model, model)
        with pytest.raises(torch.OutOfMemoryError, match="allowed are 120000"):
            four_times(torch.ones(100, 100, requires_grad=True))
