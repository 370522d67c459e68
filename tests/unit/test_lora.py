"""LoRA under plans against weights merged by hand, and what it leaves behind for plain timm."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from d2ft_hpc.errors import ConfigError, UnsupportedModelError
from d2ft_hpc.execution.executor import attach
from d2ft_hpc.metering import measure_costs
from d2ft_hpc.model.lora import add_lora, timm_state
from d2ft_hpc.model.subnets import LINEAR_LAYERS, ParameterClass, SubnetMap
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.scores import fisher_information, weight_magnitude
from tests.models import DEPTH, HEADS, random_batch, tiny_vit
from tests.reference import reference_forward

pytest.importorskip("peft")
ALL = ("qkv", "proj", "fc1", "fc2")


def adapted(layers: tuple[str, ...] = ALL, seed: int = 0) -> VisionTransformer:
    """A tiny model with low-rank products that are not zero."""
    model = tiny_vit(seed)
    add_lora(model, rank=2, alpha=3, dropout=0.0, layers=layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def merged_twin(model: VisionTransformer) -> VisionTransformer:
    """A plain model whose adapted weights are base + alpha / rank * B A, on the autograd graph of `model`."""
    twin = tiny_vit()
    twin.requires_grad_(False)
    for block, of_twin in zip(model.blocks, twin.blocks, strict=True):
        for name in LINEAR_LAYERS:
            layer, plain = block.get_submodule(name), of_twin.get_submodule(name)
            if hasattr(layer, "lora_A"):
                product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                del plain.weight
                plain.weight = layer.base_layer.weight + 3 / 2 * product
    return twin


@pytest.mark.parametrize("layers", [ALL, ("qkv", "fc2")])
def test_a_plan_runs_adapted_heads_as_merged_weights_would(layers: tuple[str, ...]) -> None:
    model = adapted(layers)
    executor = attach(model)
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    rng = np.random.default_rng(0)
    images, labels = random_batch(0)
    for _ in range(6):
        operations = rng.integers(0, 3, (1, DEPTH, HEADS)).astype(np.uint8)
        executor.load(SkipPlan(operations, 1), 0)
        with executor.micro_batch(0):
            loss = F.cross_entropy(model.train()(images), labels)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        expected_loss = F.cross_entropy(reference_forward(merged_twin(model), images, operations[0]), labels)
        torch.testing.assert_close(loss, expected_loss)
        expected = torch.autograd.grad(expected_loss, list(trained.values()), allow_unused=True)
        for name, one, other in zip(trained, gradients, expected, strict=True):
            one, other = (torch.zeros(()) if g is None else g for g in (one, other))
            torch.testing.assert_close(
                one.expand_as(trained[name]), other.expand_as(trained[name]), rtol=1e-4, atol=1e-6
            )


def test_what_trains_and_what_heads_own() -> None:
    model = adapted()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        n for n, _ in model.named_parameters() if "lora_" in n or n.startswith(("norm.", "head."))
    }
    subnets = SubnetMap.of(model)
    own = {
        name: subnets.classify(f"blocks.0.{name}") is ParameterClass.SUBNET
        for name, _ in model.blocks[0].named_parameters()
        if "lora_" in name
    }
    assert own == {
        f"{layer}.lora_{half}.default.weight": (half == "B") == (layer in ("attn.qkv", "mlp.fc1"))
        for layer in LINEAR_LAYERS
        for half in "AB"
    }
    assert subnets.classify("blocks.0.attn.qkv.base_layer.weight") is ParameterClass.SUBNET
    assert subnets.classify("blocks.0.attn.proj.base_layer.bias") is ParameterClass.SHARED


def test_the_merged_state_is_plain_timms() -> None:
    model = adapted()
    plain = tiny_vit()
    plain.load_state_dict(timm_state(model), strict=True)
    images, _ = random_batch(1)
    torch.testing.assert_close(plain.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-5)
    untouched = tiny_vit()
    state = timm_state(untouched)
    assert all(torch.equal(state[name], value) for name, value in untouched.state_dict().items())


def test_scores_and_costs_of_an_adapted_model() -> None:
    model = adapted()
    images, labels = random_batch(0)
    subnets = SubnetMap.of(model)
    plain = tiny_vit()
    plain.load_state_dict(timm_state(model))
    expected = fisher_information(plain, SubnetMap.of(plain), images, labels, F.cross_entropy)
    torch.testing.assert_close(
        fisher_information(model, subnets, images, labels, F.cross_entropy), expected, rtol=1e-3, atol=1e-9
    )
    assert weight_magnitude(model, subnets).min() > weight_magnitude(tiny_vit(), SubnetMap.of(plain)).min()
    executor = attach(model)
    costs = measure_costs(model, executor, (3, 16, 16))
    assert 0.4 < costs.forward_share < 0.55  # the weights that LoRA freezes have no gradients


def test_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    dora = tiny_vit()
    inject_adapter_in_model(LoraConfig(r=2, use_dora=True, target_modules=["qkv"]), dora)
    with pytest.raises(UnsupportedModelError, match=r"block 0 has attn\.qkv of class .*plain LoRA"):
        SubnetMap.of(dora)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'd2ft-hpc\[lora\]'"):
        add_lora(tiny_vit(), rank=2, alpha=2, dropout=0.0, layers=ALL)
