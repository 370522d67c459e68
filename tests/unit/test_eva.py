"""timm's Eva under plans: rotary positions, gated MLPs, grouped queries; against timm's own modules with masks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.eva import Eva, EvaBlockPostNorm
from torch import Tensor, nn

from d2ft_hpc.errors import ConfigError, UnsupportedModelError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.families.timm_eva import TimmEva
from d2ft_hpc.metering import measure_costs, meter
from d2ft_hpc.model.lora import add_lora
from d2ft_hpc.model.subnets import ParameterClass, SubnetMap
from d2ft_hpc.parallel.model_part import ModelPart
from d2ft_hpc.planning.plan import SkipPlan
from d2ft_hpc.scores.gradient_observer import GradientObserver
from d2ft_hpc.scores.gradient_scores import gradient_scores
from tests.masked import assert_close, loss_and_gradients, planned
from tests.models import random_batch, tiny
from tests.reference import FORWARD_ONLY, FULL, SHORTCUT
from tests.subnet_checks import assert_heads_own_whole_parameters

DEPTH, HEADS = 3, 3

VARIANTS: dict[str, dict[str, Any]] = {
    "like EVA-02 small": {
        "swiglu_mlp": True,
        "mlp_ratio": 8 / 3 + 0.05,  # 130 units
        "use_rot_pos_emb": True,
        "ref_feat_shape": (4, 4),
    },
    "like EVA-02 without its inner norm": {
        "swiglu_mlp": True,
        "swiglu_align_to": 8,
        "mlp_ratio": 8 / 3,
        "qkv_fused": False,
        "use_rot_pos_emb": True,
    },
    "like DINOv3": {
        "qkv_bias": False,
        "init_values": 0.3,
        "num_reg_tokens": 4,
        "rope_type": "dinov3",
        "use_rot_pos_emb": True,
        "rope_rotate_half": True,
        "use_abs_pos_emb": False,
    },
    "like rotary ViTs with mixed frequencies": {
        "init_values": 0.3,
        "rope_type": "mixed",
        "use_rot_pos_emb": True,
        "attn_type": "rope",
        "qk_norm": True,
    },
    "grouped queries": {
        "num_heads": 6,
        "num_kv_heads": 3,
        "embed_dim": 96,
        "attn_type": "rope",
        "qkv_fused": False,
        "use_rot_pos_emb": True,
    },
    "norms after the branches": {"use_post_norm": True, "global_pool": "token"},
}


def tiny_eva(**options: Any) -> Eva:
    """Blocks of 3 subnets, with biases and norms away from their initial values."""
    sizes = {"depth": DEPTH, "num_heads": HEADS, "num_classes": 10, "head_init_scale": 1.0}
    return tiny(Eva, 0.1, **{**sizes, **options})


def some_rows() -> dict[str, np.ndarray]:
    rows = {
        "all forward only": np.full((DEPTH, HEADS), FORWARD_ONLY),
        "a block skipped": np.array([[FULL, SHORTCUT, FORWARD_ONLY], [SHORTCUT] * 3, [FULL] * 3]),
        "forward only and shortcut": np.array([[FORWARD_ONLY, SHORTCUT, SHORTCUT]] * DEPTH),
    }
    for seed in range(4):
        rows[f"random {seed}"] = np.random.default_rng(seed).integers(0, 3, (DEPTH, HEADS))
    return {name: row.astype(np.uint8) for name, row in rows.items()}


@contextmanager
def masked(layer: nn.Linear, row: np.ndarray) -> Iterator[None]:
    """Inside, what the heads give goes through the layer by their operations."""
    units = layer.in_features
    head = torch.tensor([next(h for h in range(HEADS) if u < (h + 1) * units // HEADS) for u in range(units)])
    operation = torch.tensor(row.astype(int))[head]

    def forward(x: Tensor) -> Tensor:
        full = F.linear(x * (operation == FULL), layer.weight)
        beside = F.linear(x * (operation == FORWARD_ONLY), layer.weight).detach()
        return full + beside if layer.bias is None else full + beside + layer.bias

    layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.forward


def masked_forward(model: Eva, images: Tensor, operations: np.ndarray) -> Tensor:
    """Logits of a model without an executor under a row, by timm's own modules with masks before proj and fc2."""
    x, rope = model._pos_embed(model.patch_embed(images))
    x = model.norm_pre(x)
    for index, (block, row) in enumerate(zip(model.blocks, operations, strict=True)):
        if (row == SHORTCUT).all():
            continue
        own = rope[index] if getattr(model, "rope_mixed", False) else rope
        flows = (lambda y: y) if (row == FULL).any() else Tensor.detach
        with masked(block.attn.proj, row), masked(block.mlp.fc2, row):
            if isinstance(block, EvaBlockPostNorm):
                x = x + flows(block.norm1(block.attn(x, rope=own)))
                x = x + flows(block.norm2(block.mlp(x)))
            else:
                scale1, scale2 = (1 if g is None else g for g in (block.gamma_1, block.gamma_2))
                x = x + flows(scale1 * block.attn(block.norm1(x), rope=own))
                x = x + flows(scale2 * block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("row", some_rows().values(), ids=some_rows())
def test_gradients_equal_timms_modules_with_masks(variant: str, row: np.ndarray) -> None:
    reference = tiny_eva(**VARIANTS[variant]).double()
    model = copy.deepcopy(reference)
    images, labels = random_batch(1)
    planned(model, row)
    found = loss_and_gradients(model, F.cross_entropy(model(images.double()), labels))
    logits = masked_forward(reference, images.double(), row)
    expected = loss_and_gradients(reference, F.cross_entropy(logits, labels))
    assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_full_is_timms_model_bit_for_bit(variant: str) -> None:
    dense = tiny_eva(**VARIANTS[variant])
    model = copy.deepcopy(dense)
    executor = attach(model, embeddings="trained")
    executor.activate(SkipPlan(np.full((1, DEPTH, HEADS), FULL, np.uint8), replicas=1), replica=0)
    images, labels = random_batch(1)
    with executor.micro_batch(0):
        loss, gradients = loss_and_gradients(model, F.cross_entropy(model(images), labels))
    expected_loss, expected = loss_and_gradients(dense, F.cross_entropy(dense(images), labels))
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.eval()(images), dense.eval()(images))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_of_the_blocks_has_its_heads_or_none(variant: str) -> None:
    model = tiny_eva(**VARIANTS[variant])
    subnets = SubnetMap.of(model)
    assert subnets.shape == (DEPTH, HEADS)
    assert_heads_own_whole_parameters(model, subnets)
    shared = {
        name.split(".", 2)[2]
        for name, _ in model.named_parameters()
        if subnets.classify(name) is ParameterClass.SHARED
    }
    assert all(
        "norm" in name or "gamma" in name or name in ("attn.proj.bias", "mlp.fc2.bias") for name in shared
    )


def test_costs_are_those_of_timms_model() -> None:
    dense = tiny_eva(**VARIANTS["like EVA-02 small"])
    dense.requires_grad_(True)
    model = copy.deepcopy(dense)
    executor = attach(model, embeddings="trained")
    costs = measure_costs(model, executor, (3, 16, 16))
    with meter() as metered:
        dense(torch.zeros(1, 3, 16, 16)).sum().backward()
    assert costs.dense_flops == metered.flops
    assert 0.25 < costs.forward_share < 0.4


@pytest.mark.parametrize(
    "variant", ["like EVA-02 small", "like EVA-02 without its inner norm", "grouped queries"]
)
def test_fisher_information_is_that_of_the_parameters_own_gradients(variant: str) -> None:
    model = tiny_eva(**VARIANTS[variant])
    subnets = attach(model, embeddings="trained").subnets
    images, labels = random_batch(2)
    scores = gradient_scores(model, subnets, images, labels, F.cross_entropy, ["fisher"])["fisher"]
    observer = GradientObserver(model, subnets, 1, lambda: 0, lambda: 1.0)
    _, gradients = loss_and_gradients(model, F.cross_entropy(model(images), labels))
    observer.close()
    expected = torch.zeros(subnets.shape)
    for block, name, _ in subnets.parameters(model):
        expected[block] += subnets.head_axes[name].sum_by_head(gradients[f"blocks.{block}.{name}"].square())
    torch.testing.assert_close(scores[0], expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(observer.sums[0], expected, rtol=1e-4, atol=1e-9)
    assert "attn.qkv.bias" not in dict(model.blocks[0].named_parameters())


def test_adapters_of_rows_run_by_head() -> None:
    pytest.importorskip("peft")
    reference = tiny_eva(**VARIANTS["like EVA-02 without its inner norm"]).double()
    add_lora(reference, rank=2, alpha=3, dropout=0.0, layers=("qkv", "fc1"))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    factors = [name for name, _ in reference.named_parameters() if ".lora_A." in name]
    adapted = {name.split(".lora_A.")[0].split(".", 2)[2] for name in factors}
    assert adapted == {"attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc1_g", "mlp.fc1_x"}
    model = copy.deepcopy(reference)
    images, labels = random_batch(1)
    row = some_rows()["random 1"]
    executor = attach(model)
    executor.activate(SkipPlan(row[None], replicas=1), replica=0)
    with executor.micro_batch(0):
        _, gradients = loss_and_gradients(model, F.cross_entropy(model(images.double()), labels))
    logits = masked_forward(reference, images.double(), row)
    _, expected = loss_and_gradients(reference, F.cross_entropy(logits, labels))
    trained = [name for name in expected if "lora_" in name]
    for name in trained:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-9, atol=1e-12)


def test_adapters_that_timm_passes_by_are_refused() -> None:
    pytest.importorskip("peft")
    model = tiny_eva(**VARIANTS["like EVA-02 small"])
    with pytest.raises(UnsupportedModelError, match=r"LoRA on attn.qkv, which timm passes by"):
        add_lora(model, rank=2, alpha=3, dropout=0.0, layers=("qkv",))


def test_frequencies_train_where_gradients_are_reduced_after_the_backward_alone() -> None:
    options = VARIANTS["like rotary ViTs with mixed frequencies"]
    attach(tiny_eva(**options)).bind(None, Reduction.EVERY_MICRO_BATCH)
    executor = attach(tiny_eva(**options), embeddings="trained")
    executor.bind(None, Reduction.AFTER_BACKWARD)
    with pytest.raises(ConfigError, match=r"rope.freqs takes its gradient from the blocks.*frozen"):
        executor.bind(None, Reduction.EVERY_MICRO_BATCH)


def test_ranks_do_not_get_parts() -> None:
    model = tiny_eva(**VARIANTS["like DINOv3"])
    with pytest.raises(
        UnsupportedModelError, match=r"rotary positions.*use neither tensor parallelism nor a pipeline"
    ):
        ModelPart(model, range(1), attach(model))


@pytest.mark.parametrize("dynamic", [False, True])
def test_rotary_positions_of_dinov3_are_made_once_for_graphs(dynamic: bool) -> None:
    """timm makes them on the processor in each pass, from which a graph cannot copy."""
    model = tiny_eva(**VARIANTS["like DINOv3"], dynamic_img_size=dynamic)
    images, _ = random_batch(0, 2)
    expected = model(images)
    TimmEva().let_graphs_capture(model)
    with torch.inference_mode():
        made = model.rope.get_embed(shape=(4, 4))
    assert model.rope.get_embed(shape=(4, 4)) is made
    found = model(images)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert torch.equal(copy.deepcopy(model)(images), expected)
    assert not torch.equal(model.rope.get_embed(shape=(2, 4)), made[:8])
    drawn = tiny_eva(**VARIANTS["like DINOv3"], rope_rescale_coords=2.0)
    with pytest.raises(ConfigError, match=r"engine\.cuda_graphs=false"):
        TimmEva().let_graphs_capture(drawn)
