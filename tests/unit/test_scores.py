"""Scores against gradients taken by plain autograd, and what a probe leaves behind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ft_hpc.execution.executor import attach
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.planning.plan import SkipPlan
from d2ft_hpc.scores import fisher_information, weight_magnitude
from tests.models import DEPTH, HEADS, random_batch, tiny_vit


def fisher_by_autograd(model: nn.Module, subnets: SubnetMap, images: Tensor, labels: Tensor) -> Tensor:
    model = copy.deepcopy(model).eval()
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    scores = torch.zeros(subnets.shape)
    for block, name, parameter in subnets.parameters(model):
        scores[block] += subnets.head_axes[name].sum_by_head(parameter.grad.square())
    return scores


@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": False, "proj_bias": False, "init_values": 0.1, "qk_norm": True}]
)
def test_fisher_equals_squared_gradients(options: dict[str, object]) -> None:
    model = tiny_vit(drop_path_rate=0.3, **options)
    subnets = SubnetMap.of(model)
    images, labels = random_batch(0)
    of_batch = fisher_information(model, subnets, images, labels, F.cross_entropy)
    torch.testing.assert_close(
        of_batch[0], fisher_by_autograd(model, subnets, images, labels), rtol=1e-4, atol=1e-9
    )
    of_samples = fisher_information(model, subnets, images, labels, F.cross_entropy, "sample")
    expected = [
        fisher_by_autograd(model, subnets, images[i : i + 1], labels[i : i + 1]) for i in range(len(labels))
    ]
    torch.testing.assert_close(of_samples, torch.stack(expected), rtol=1e-4, atol=1e-9)


def test_a_probe_leaves_model_gradients_and_random_state_as_they_were() -> None:
    model = tiny_vit(proj_drop_rate=0.2)
    executor = attach(model)
    executor.load(SkipPlan.dense(1, 1, DEPTH, HEADS), replica=0)
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
    fisher_information(model, executor.subnets, images, labels, F.cross_entropy, "sample")
    weight_magnitude(model, executor.subnets)
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
    expected = fisher_information(model, subnets, images, labels, F.cross_entropy)
    model.requires_grad_(False)
    torch.testing.assert_close(fisher_information(model, subnets, images, labels, F.cross_entropy), expected)


def test_weight_magnitude_sums_to_the_l1_norm() -> None:
    model = tiny_vit()
    subnets = SubnetMap.of(model)
    scores = weight_magnitude(model, subnets)
    for block in range(DEPTH):
        norms = [p.detach().abs().sum() for b, _, p in subnets.parameters(model) if b == block]
        torch.testing.assert_close(scores[block].sum(), torch.stack(norms).sum())
    with torch.no_grad():
        model.blocks[2].attn.proj.weight[:, 16:32] *= 3
    changed = (weight_magnitude(model, subnets) != scores).nonzero().tolist()
    assert changed == [[2, 1]]
