"""LoRA under plans against weights merged by hand, and what it leaves behind for plain timm."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from d2ft_hpc.errors import ConfigError, UnsupportedModelError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.metering import measure_costs
from d2ft_hpc.model.lora import add_lora, save_adapter, timm_state
from d2ft_hpc.model.subnets import ParameterClass, SubnetMap
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.score_table import WEIGHT_MAGNITUDE
from d2ft_hpc.scores import gradient_scores, scores_of_weights
from d2ft_hpc.scores.gradient_observer import GradientObserver
from tests.models import DEPTH, HEADS, random_batch, tiny_vit
from tests.reference import reference_forward

pytest.importorskip("peft")
ALL = ("qkv", "proj", "fc1", "fc2")
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def adapted(
    layers: tuple[str, ...] = ALL, seed: int = 0, blocks: list[int] | None = None
) -> VisionTransformer:
    """A tiny model with low-rank products that are not zero, in some of its blocks or in all."""
    model = tiny_vit(seed)
    if blocks is None:
        add_lora(model, rank=2, alpha=3, dropout=0.0, layers=layers)
    else:
        from peft import LoraConfig, get_peft_model

        # As a pattern of whole names: peft 0.18 finds no blocks by number in a model that has them at its top.
        named = rf"blocks\.({'|'.join(map(str, blocks))})\..*({'|'.join(layers)})"
        get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=named))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def merged_twin(model: VisionTransformer, scale: float = 3 / 2) -> VisionTransformer:
    """A plain model whose adapted weights are base + scale * B A, on the autograd graph of `model`."""
    twin = tiny_vit().to(next(model.parameters()).dtype)
    twin.requires_grad_(False)
    for block, of_twin in zip(model.blocks, twin.blocks, strict=True):
        for name in LAYERS:
            layer, plain = block.get_submodule(name), of_twin.get_submodule(name)
            if hasattr(layer, "lora_A"):
                product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                del plain.weight
                plain.weight = layer.base_layer.weight + scale * product
    return twin


@pytest.mark.parametrize(("layers", "blocks"), [(ALL, None), (("qkv", "fc2"), None), (ALL, [1, 3])])
def test_a_plan_runs_adapted_heads_as_merged_weights_would(
    layers: tuple[str, ...], blocks: list[int] | None
) -> None:
    model = adapted(layers, blocks=blocks).double()
    executor = attach(model)
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    rng = np.random.default_rng(0)
    images, labels = random_batch(0)
    images = images.double()
    for _ in range(6):
        operations = rng.integers(0, 3, (1, DEPTH, HEADS)).astype(np.uint8)
        executor.activate(SkipPlan(operations, 1), 0)
        with executor.micro_batch(0):
            loss = F.cross_entropy(model.train()(images), labels)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        expected_loss = F.cross_entropy(reference_forward(merged_twin(model), images, operations[0]), labels)
        torch.testing.assert_close(loss, expected_loss)
        expected = torch.autograd.grad(expected_loss, list(trained.values()), allow_unused=True)
        for name, one, other in zip(trained, gradients, expected, strict=True):
            one, other = (torch.zeros((), dtype=torch.float64) if g is None else g for g in (one, other))
            torch.testing.assert_close(
                one.expand_as(trained[name]), other.expand_as(trained[name]), rtol=1e-9, atol=1e-12
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
        for layer in LAYERS
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


def test_scores_of_the_factors_are_those_of_their_gradients() -> None:
    model = adapted()
    images, labels = random_batch(0)
    subnets = SubnetMap.of(model)
    F.cross_entropy(model(images), labels).backward()
    fisher, magnitude = torch.zeros(2, DEPTH, HEADS)
    for block, name, parameter in subnets.parameters(model):
        if "lora_" in name:
            axis = subnets.head_axes[name]
            fisher[block] += axis.sum_by_head(parameter.grad.square())
            magnitude[block] += axis.sum_by_head(parameter.detach().abs())
    scored = gradient_scores(model, subnets, images, labels, F.cross_entropy, ["fisher"])["fisher"]
    torch.testing.assert_close(scored[0], fisher, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(scores_of_weights(WEIGHT_MAGNITUDE, model, subnets), magnitude)
    observer = GradientObserver(model, subnets, 1, lambda: 0, lambda: 1.0)
    F.cross_entropy(model(images), labels).backward()
    observer.close()
    torch.testing.assert_close(observer.sums[0], fisher, rtol=1e-3, atol=1e-9)


def test_frozen_weights_cost_no_gradients_of_their_own() -> None:
    plain, model = tiny_vit(), adapted()
    of_plain, of_lora = (measure_costs(each, attach(each), (3, 16, 16)) for each in (plain, model))
    tokens, rank = 17, 2
    layers = [plain.blocks[0].get_submodule(name) for name in LAYERS]
    products = sum(2 * tokens * layer.in_features * layer.out_features for layer in layers)
    factors = sum(2 * tokens * rank * (layer.in_features + layer.out_features) for layer in layers)
    # The first layer above the frozen embeddings needs no gradient of its input, nor does its factor A.
    first = 2 * tokens * layers[0].in_features * (layers[0].out_features + rank)
    saved = of_plain.num_subnets * (of_plain.full_flops - of_lora.full_flops)
    assert saved == DEPTH * (products - 3 * factors) + first
    more = of_lora.num_subnets * (of_lora.forward_only_flops - of_plain.forward_only_flops)
    assert more == DEPTH * factors


@pytest.mark.parametrize(
    ("layers", "rslora"), [(["qkv", "proj", "fc1", "fc2"], True), (["qkv"], False), (["proj", "fc1"], True)]
)
def test_pefts_own_model_trains_under_a_plan_and_its_files_load_in_peft(
    layers: list[str], rslora: bool, tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=layers, modules_to_save=["head"])
    torch.manual_seed(3)
    wrapped = get_peft_model(tiny_vit(), config)
    executor = attach(wrapped)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    images, labels = random_batch(0)
    rng = np.random.default_rng(0)
    scale = 6 / (4**0.5 if rslora else 4)
    for _ in range(3):
        operations = rng.integers(0, 3, (1, DEPTH, HEADS)).astype(np.uint8)
        executor.activate(SkipPlan(operations, 1), 0)
        merged = merged_twin(wrapped.get_base_model(), scale)
        merged.head.load_state_dict(wrapped.get_base_model().head.modules_to_save["default"].state_dict())
        with executor.micro_batch(0):
            loss = F.cross_entropy(wrapped.train()(images), labels)
            loss.backward()
        torch.testing.assert_close(
            loss, F.cross_entropy(reference_forward(merged, images, operations[0]), labels)
        )
        optimizer.step()
        optimizer.zero_grad()
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
    torch.testing.assert_close(loaded(images), wrapped.eval()(images))
    plain = tiny_vit()
    assert loaded.merge_and_unload().state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(loaded.merge_and_unload()(images), wrapped(images), rtol=1e-4, atol=1e-5)


def test_a_runs_adapter_loads_in_peft_and_merges_to_the_runs_model(tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted()
    with torch.no_grad():
        model.head.weight.add_(1.0)
        model.norm.weight.add_(1.0)
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
    images, _ = random_batch(1)
    torch.testing.assert_close(loaded(images), model.eval()(images))
    merged, expected = loaded.merge_and_unload().state_dict(), timm_state(model)
    assert merged.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(merged[name], expected[name], msg=name)


def test_factors_in_float32_beside_weights_in_bfloat16() -> None:
    """peft keeps them so; a plan of all heads, none of them dense, then gives what peft gives."""
    model = adapted().bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    images, _ = random_batch(0)
    expected = model.train()(images.bfloat16())
    executor = attach(model)
    operations = np.ones((1, DEPTH, HEADS), np.uint8)
    executor.activate(SkipPlan(operations, 1), 0)
    with executor.micro_batch(0):
        torch.testing.assert_close(model(images.bfloat16()), expected, rtol=0.1, atol=0.1)


def test_disabled_and_merged_factors_count_as_in_peft() -> None:
    model = adapted()
    executor = attach(model)
    executor.activate(SkipPlan(np.ones((1, DEPTH, HEADS), np.uint8), 1), 0)
    images, _ = random_batch(0)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]

    def logits(train: bool) -> torch.Tensor:
        with executor.micro_batch(0):
            return model.train(train)(images).detach()

    for layer in layers:
        layer.merge()
    torch.testing.assert_close(logits(True), logits(False), rtol=1e-4, atol=1e-5)
    for layer in layers:
        layer.unmerge()
        layer.enable_adapters(False)
    torch.testing.assert_close(logits(True), tiny_vit()(images).detach(), rtol=1e-4, atol=1e-5)


def test_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import AdaLoraConfig, LoraConfig, inject_adapter_in_model

    for variant, name in (({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "lora_bias")):
        model = tiny_vit()
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["qkv"], **variant), model)
        told = rf"block 0 has attn\.qkv with peft's {name}; of its LoRA only the plain one is supported"
        with pytest.raises(UnsupportedModelError, match=told):
            SubnetMap.of(model)
    model = tiny_vit()
    inject_adapter_in_model(AdaLoraConfig(target_modules=["qkv"], total_step=10), model)
    with pytest.raises(UnsupportedModelError, match=r"block 0 has attn\.qkv of class SVDLinear, not Linear"):
        SubnetMap.of(model)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'd2ft-hpc\[lora\]'"):
        add_lora(tiny_vit(), rank=2, alpha=2, dropout=0.0, layers=ALL)


def test_lora_in_some_blocks_only_leaves_the_others_out_of_plans() -> None:
    model = adapted(blocks=[1, 3])
    executor = attach(model)
    assert executor.trains.tolist() == [False, True, False, True]
    magnitude = scores_of_weights(WEIGHT_MAGNITUDE, model, executor.subnets)
    assert (magnitude > 0).all(1).tolist() == [False, True, False, True]
    costs = measure_costs(model, executor, (3, 16, 16))
    assert costs.num_subnets == 2 * HEADS
    assert costs.full_by_block[0] < costs.full_by_block[1]
