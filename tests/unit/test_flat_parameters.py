"""Blocks whose parameters are flat ones train as they would without."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.engines.portable import PortableState, write_file
from d2ft_hpc.engines.zero import ZeroRules
from d2ft_hpc.errors import CheckpointError
from d2ft_hpc.execution.accumulation import Accumulator, let_accumulate
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.flat_parameters import FlatParameters
from d2ft_hpc.model.lora import add_lora
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.user_loop.initialize import _can_flatten
from d2ft_hpc.user_loop.section import split
from tests.models import DEPTH, HEADS, random_batch, tiny_vit


def make(is_flat: bool, lora: bool = False) -> tuple[PlainEngine, PlanExecutor]:
    model = tiny_vit()
    if lora:
        add_lora(model, rank=2, alpha=3, dropout=0.0, layers=("qkv", "fc1"))
    executor = attach(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW([group for group in groups if group["params"]], lr=1e-2)
    if is_flat:
        executor.flat = FlatParameters(model, executor.blocks, optimizer.param_groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return PlainEngine(model, executor, optimizer, schedule, F.cross_entropy), executor


def train(engine: PlainEngine, executor: PlanExecutor, steps: range) -> None:
    for step in steps:
        rng = np.random.default_rng(step)
        plan = SkipPlan(rng.integers(0, 3, (2, DEPTH, HEADS)).astype(np.uint8), 1)
        executor.activate(SkipPlan.dense(2, 1, DEPTH, HEADS) if step == 3 else plan, 0)
        engine.step([random_batch(2 * step), random_batch(2 * step + 1)])


def weights(engine: PlainEngine) -> dict[str, Tensor]:
    with engine.full_model() as model:
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("lora", [False, True])
def test_they_train_as_without_to_the_bit(lora: bool) -> None:
    trained = []
    for is_flat in (False, True):
        engine, executor = make(is_flat, lora)
        train(engine, executor, range(5))
        trained.append(weights(engine))
    without, flat = trained
    assert list(flat) == list(without)
    assert all(torch.equal(flat[name], without[name]) for name in without)


def test_there_are_two_for_a_block_and_the_model_has_its_own_again_where_it_is_read() -> None:
    engine, executor = make(True)
    flat, model = executor.flat, cast(Any, engine._model)
    assert flat is not None
    of_block = [name for name, _ in model.named_parameters() if name.startswith("blocks.1.")]
    assert of_block == ["blocks.1.flat_0", "blocks.1.flat_1"]
    # Outside of a block's run nothing can be read by mistake.
    assert model.blocks[1].attn.qkv.weight.is_meta
    images, _ = random_batch(0)
    model.eval()
    before = model(images)
    with engine.full_model() as module:
        full: Any = module
        assert {name for name, _ in full.named_parameters()} == {
            name for name, _ in tiny_vit().named_parameters()
        }
        assert torch.equal(full(images), before)
        with torch.no_grad():
            full.blocks[1].attn.qkv.weight.zero_()
    split = flat.split(dict(model.named_parameters()))
    assert not split["blocks.1.attn.qkv.weight"].any()
    assert split["blocks.1.attn.proj.weight"].any()


def test_checkpoints_have_the_models_own_names_and_go_on_either_way(tmp_path: Path) -> None:
    engine, executor = make(True)
    train(engine, executor, range(2))
    engine.save(tmp_path, write_file)
    state = PortableState.read(tmp_path)
    assert set(state.weights) == set(tiny_vit().state_dict())
    assert "blocks.0.attn.qkv.weight" in state.moments["exp_avg"]
    train(engine, executor, range(2, 4))
    for is_flat in (False, True):
        other, of_other = make(is_flat)
        other.restore(tmp_path)
        train(other, of_other, range(2, 4))
        resumed, uninterrupted = weights(other), weights(engine)
        assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)


def test_another_models_checkpoint_is_refused_by_name() -> None:
    executor = make(True)[1]
    assert executor.flat is not None
    weights = dict(tiny_vit().state_dict())
    joined = executor.flat.join(weights)
    split = executor.flat.split(joined)
    assert all(torch.equal(split[name], value) for name, value in weights.items())
    del weights["blocks.2.mlp.fc1.bias"]
    with pytest.raises(CheckpointError, match=r"another model: 'blocks\.2\.mlp\.fc1\.bias' is missing"):
        executor.flat.check_parts(weights)


def test_parameters_that_several_modules_hold_or_whose_gradient_is_waited_for_stay_as_they_are() -> None:
    model = tiny_vit()
    model.blocks[2].norm1.weight = model.blocks[1].norm1.weight
    model.blocks[3].norm2 = model.blocks[0].norm2
    watched = model.blocks[1].mlp.fc1.weight
    watched.register_post_accumulate_grad_hook(lambda parameter: None)
    executor = attach(model)
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    FlatParameters(model, executor.blocks, optimizer.param_groups)
    assert model.blocks[2].norm1.weight is model.blocks[1].norm1.weight
    assert not model.blocks[1].norm1.weight.is_meta
    assert not model.blocks[3].norm2.weight.is_meta
    assert model.blocks[1].mlp.fc1.weight is watched


def hidden(model: Any) -> tuple[PlanExecutor, FlatParameters]:
    executor = attach(model)
    groups = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    executor.flat = FlatParameters(model, executor.blocks, groups, keeps_parts=True)
    executor.flat.hide()
    return executor, executor.flat


def gradients(model: Any, flat: FlatParameters | None) -> dict[str, Tensor]:
    """After one backward pass, by the model's own names."""
    images, labels = random_batch(0)
    F.cross_entropy(model(images), labels).backward()
    with nullcontext() if flat is None else flat.shown():
        found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return found if flat is None else flat.split(found)


def test_hidden_ones_do_as_scripts_say_of_the_parameters_that_they_see() -> None:
    found = []
    for is_hidden in (False, True):
        model = tiny_vit()
        executor = attach(model) if not is_hidden else None
        flat = None if executor else hidden(model)[1]
        model.blocks[1].attn.qkv.weight.requires_grad_(False)
        model.blocks[2].mlp.requires_grad_(False)
        seen: list[Tensor] = []

        def halve(gradient: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(gradient.clone())
            return gradient / 2

        model.blocks[0].mlp.fc1.weight.register_hook(halve)
        found.append((gradients(model, flat), seen))
    (without, (seen_without,)), (flat_ones, (seen_flat,)) = found
    assert torch.equal(seen_flat, seen_without)
    assert set(flat_ones) > set(without)
    for name, gradient in flat_ones.items():  # a frozen part of what trains gets zeros
        assert torch.equal(gradient, without.get(name, torch.zeros_like(gradient))), name
    assert not flat_ones["blocks.1.attn.qkv.weight"].any()
    assert flat_ones["blocks.1.attn.qkv.bias"].any()


def test_gradients_of_parts_add_up_in_the_place_of_the_flat_one() -> None:
    """Also those of parts whose gradient a hook of a script's changes."""
    model: Any = tiny_vit()
    _, flat = hidden(model)
    model.blocks[0].mlp.fc1.weight.register_hook(lambda gradient: 2 * gradient)
    parameters = [each.parameter for each in flat._of_block[0]]

    def loss() -> Tensor:
        return F.cross_entropy(model(random_batch(0)[0]), random_batch(0)[1])

    expected = torch.autograd.grad(loss(), parameters)
    accumulators = [Accumulator(torch.ones_like(parameter)) for parameter in parameters]
    for parameter, accumulator in zip(parameters, accumulators, strict=True):
        let_accumulate(parameter, accumulator)
    handed = torch.autograd.grad(loss(), parameters, allow_unused=True)
    assert handed == (None,) * len(parameters)
    for accumulator, gradient in zip(accumulators, expected, strict=True):
        assert accumulator.got_any
        torch.testing.assert_close(accumulator.place, gradient + 1)


def test_an_evaluation_takes_the_weights_that_a_script_put_in_for_it() -> None:
    model, reference = tiny_vit(), tiny_vit(1)
    hidden(model)
    images, _ = random_batch(0)
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    with torch.no_grad():
        before = model.eval()(images)
        for name, parameter in reference.named_parameters():
            model.get_parameter(name).data = parameter.data
        assert torch.equal(model(images), reference.eval()(images))
        for name, data in own.items():
            model.get_parameter(name).data = data
    assert torch.equal(model(images), before)


def test_hidden_ones_that_an_engine_moved_take_their_parts_along() -> None:
    model = tiny_vit()
    _, flat = hidden(model)
    with flat.shown():
        moved = {name: each for name, each in model.named_parameters() if "flat_" in name}
    for each in moved.values():
        each.data = each.data.clone()
    flat.share_memory()
    with torch.no_grad():
        next(iter(moved.values())).zero_()
    assert not model.blocks[0].norm1.weight.any()
    weight = model.blocks[1].norm1.weight
    assert weight.any()
    weight.data = weight.data.clone()  # and so do those that a script moved
    flat.share_memory()
    with torch.no_grad():
        for each in moved.values():
            each.zero_()
    assert not weight.any()


def test_parameters_that_are_in_the_groups_twice_are_left_for_the_engine_to_refuse() -> None:
    model = tiny_vit()
    executor = attach(model)
    twice = model.blocks[1].mlp.fc1.weight
    groups = [{"params": list(model.blocks.parameters())}, {"params": [twice, model.blocks[2].norm1.weight]}]
    FlatParameters(model, executor.blocks, groups)
    assert [sum(each is twice for each in group["params"]) for group in groups] == [1, 1]
    assert model.blocks[1].mlp.fc1.weight is twice


@pytest.mark.parametrize(
    ("settings", "optimizer", "can"),
    [
        ({}, AdamW([torch.nn.Parameter(torch.ones(1))]), True),
        ({"optimizer": {"type": "AdamW"}}, None, True),
        ({"optimizer": {"type": "Muon"}}, None, False),
        ({}, AdamW, False),  # a function of the parameters, which may go by their shapes
        ({"torch_autocast": {"enabled": True}}, None, False),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, None, False),
    ],
)
def test_scripts_flatten_unless_something_goes_by_single_parameters(
    settings: dict[str, Any], optimizer: Any, can: bool
) -> None:
    own, section = split({"zero_optimization": {"stage": 1}, "d2ft": {"planner": "random"}, **settings})
    assert _can_flatten(ZeroRules.of(own), own, section, optimizer) is can
