"""Blocks of copied heads, as they run on a GPU: the same results as with weights that are indexed where they are used,
which other tests compare with the libraries' own modules; eagerly, and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ft_hpc.execution import block_runner
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.families.table import backbone_of, family_of
from d2ft_hpc.model.lora import add_lora
from d2ft_hpc.planning.plan import SkipPlan
from tests.masked import LossAndGradients, assert_close, loss_and_gradients
from tests.models import random_batch, tiny, tiny_vit
from tests.reference import FORWARD_ONLY, FULL, SHORTCUT
from tests.unit.test_eva import VARIANTS, tiny_eva

HEADS = 3


def packed_gate() -> nn.Module:
    """DINOv2's giant in small: gate and value in one layer, 130 units for 3 heads."""
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    options = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 2 * 130 / 48, "init_values": 0.3}
    return tiny(VisionTransformer, 0.05, num_classes=10, **options)


def with_lora() -> nn.Module:
    model = tiny_eva(**VARIANTS["like EVA-02 without its inner norm"])
    add_lora(model, rank=2, alpha=4, dropout=0.0)
    return with_random_factors(model)


def with_lora_in_a_block() -> nn.Module:
    peft = pytest.importorskip("peft")
    model = tiny_eva(**VARIANTS["like EVA-02 without its inner norm"])
    config = peft.LoraConfig(
        r=2, target_modules=["attn.proj"], layers_to_transform=[1], layers_pattern="blocks"
    )
    adapted: nn.Module = peft.get_peft_model(model, config).get_base_model()
    adapted.get_submodule("head").requires_grad_(True)
    return with_random_factors(adapted)


def with_random_factors(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5.24")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(
        vocab_size=40, num_attention_heads=6, num_key_value_heads=HEADS, **sizes
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.train()


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: tiny_eva(**VARIANTS[name]) for name in VARIANTS},  # type: ignore[misc]
    "like DINOv2 giant": packed_gate,
    "drop path": lambda: tiny_vit(depth=3, drop_path_rate=0.2),
    "EVA-02 with LoRA": with_lora,
    "EVA-02 with LoRA in a block": with_lora_in_a_block,
    "Llama": llama,
}


def loss_of(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    if hasattr(model, "generate"):
        ids = torch.randint(40, (4, 12)).to(next(model.parameters()).device)
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss
    images, labels = random_batch(0)
    weight = next(model.parameters())
    return F.cross_entropy(model(images.to(weight)), labels.to(weight.device))


def trained(model: nn.Module, row: np.ndarray, *, compile: bool) -> LossAndGradients:
    executor = attach(model, embeddings="trained", compile=compile)
    executor.activate(SkipPlan(row[None], replicas=1), replica=0)
    executor.bind(lambda: 0, Reduction.AFTER_BACKWARD)
    return loss_and_gradients(model, loss_of(model))


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Sets whether the heads' weights are copied together on a CPU, too."""
    return lambda value: monkeypatch.setattr(block_runner, "has_kernels", lambda x: value)


def rows(depth: int) -> list[np.ndarray]:
    skipped = [FULL, FORWARD_ONLY, SHORTCUT]
    whole = [[FULL, SHORTCUT, FULL], [FORWARD_ONLY] * 3, [FULL, FORWARD_ONLY, FORWARD_ONLY], [SHORTCUT] * 3]
    return [
        np.array([np.roll(skipped, block) for block in range(depth)], np.uint8),
        np.array([whole[block % len(whole)] for block in range(depth)], np.uint8),
    ]


@pytest.mark.parametrize("kind", MODELS)
def test_copied_heads_compute_the_same(kind: str, copying: Callable[[bool], None]) -> None:
    model = MODELS[kind]().double()
    backbone = backbone_of(model)
    for row in rows(len(family_of(backbone).blocks(backbone))):
        copying(False)
        expected = trained(copy.deepcopy(model), row, compile=False)
        copying(True)
        assert_close(trained(copy.deepcopy(model), row, compile=False), expected, rtol=1e-9, atol=1e-12)


def test_frozen_parameters_get_no_gradients(copying: Callable[[bool], None]) -> None:
    copying(True)
    model = packed_gate()
    frozen = ("attn.qkv.weight", "mlp.fc1.bias", "mlp.fc2.weight")
    for block in model.get_submodule("blocks").children():
        for name in frozen:
            block.get_parameter(name).requires_grad_(False)
    trained(model, rows(4)[0], compile=False)
    for block in model.get_submodule("blocks").children():
        had = {name for name, parameter in block.named_parameters() if parameter.grad is None}
        assert had == set(frozen)


@pytest.mark.full
@pytest.mark.parametrize(
    "kind", ["like EVA-02 small", "like DINOv2 giant", "norms after the branches", "Llama"]
)
def test_compiled_blocks_of_copied_heads_compute_the_same(kind: str, copying: Callable[[bool], None]) -> None:
    copying(True)
    torch._dynamo.reset()
    model = MODELS[kind]()
    backbone = backbone_of(model)
    row = rows(len(family_of(backbone).blocks(backbone)))[0]
    expected = trained(copy.deepcopy(model), row, compile=False)
    torch._dynamo.utils.counters.clear()
    found = trained(model, row, compile=True)
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.full
def test_attention_of_all_blocks_is_compiled_once() -> None:
    """Rotary positions in blocks that otherwise run by our own kernels."""
    model = tiny_eva(**VARIANTS["like DINOv3"])
    family: Any = family_of(model)
    _, beside = family.below(model, random_batch(0)[0])
    torch._dynamo.reset()
    compiled = torch.compile(block_runner._attend, dynamic=False)
    heads = torch.tensor([0, 2])
    parts = [family.kernel_parts(block) for block in family.blocks(model)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, of_block in enumerate(parts):
            assert not of_block.is_plain
            given = family.arguments(beside, seed)
            results = []
            for attend in (of_block.attend, lambda *a, part=of_block, **k: compiled(part.attend, *a, **k)):
                torch.manual_seed(seed)
                inputs = [torch.randn(2, 2, 21, 16, requires_grad=True) for _ in range(3)]
                mixed = attend(*inputs, heads, **given)
                results.append([mixed, *torch.autograd.grad(mixed.square().sum(), inputs)])
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
