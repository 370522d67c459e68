"""Every model of timm's that is called supported, with its own settings in two narrow blocks, under plans."""

from __future__ import annotations

import copy
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import d2ft_hpc
from d2ft_hpc import families
from d2ft_hpc.errors import UnsupportedModelError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.compilation import compile_outside_blocks
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.families.table import backbone_of, family_of
from d2ft_hpc.metering import measure_costs, meter
from d2ft_hpc.model.census import census, described, support_of
from d2ft_hpc.model.lora import add_lora
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.parallel.head_split import check_parts, cut_block
from d2ft_hpc.planning.plan import SkipPlan
from tests.masked import assert_close, loss_and_gradients, masked_blocks
from tests.reference import FORWARD_ONLY, FULL, SHORTCUT

HEADS, WIDTH = 3, 48
ROWS = np.array(
    [
        [[FULL, SHORTCUT, FORWARD_ONLY], [FORWARD_ONLY, FULL, FULL]],
        [[FULL, FULL, FULL], [FORWARD_ONLY, SHORTCUT, FORWARD_ONLY]],
        [[FORWARD_ONLY, FORWARD_ONLY, FORWARD_ONLY], [SHORTCUT, FULL, SHORTCUT]],
    ],
    np.uint8,
)
REPRESENTATIVES = [
    "aimv2_1b_patch14_224",
    "aimv2_3b_patch14_224",
    "beit3_base_patch16_224",
    "beit3_giant_patch14_224",
    "beit_base_patch16_224",
    "beit_large_patch16_224",
    "deepseek_vit_412m",
    "deepseek_vit_412m_enc",
    "deit3_base_patch16_224",
    "deit_base_distilled_patch16_224",
    "deit_base_patch16_224",
    "eva02_base_patch14_224",
    "eva02_base_patch16_clip_224",
    "eva02_enormous_patch14_clip_224",
    "eva02_small_patch14_224",
    "eva_giant_patch14_224",
    "naflexvit_base_patch16_gap",
    "naflexvit_base_patch16_siglip",
    "naflexvit_giant_patch16_radio_v3",
    "naflexvit_so150m2_patch16_reg1_gap",
    "naflexvit_so400m_patch16_radio_v4",
    "naflexvit_so400m_patch16_siglip",
    "qwen3_vit_88m",
    "qwen3_vit_88m_enc",
    "qwen3_vit_416m",
    "qwen3_vit_416m_enc",
    "test_vit",
    "test_vit2",
    "test_vit3",
    "test_vit4",
    "test_vit_relpos",
    "vit_7b_patch16_dinov3",
    "vit_base_mci_224",
    "vit_base_patch14_dinov2",
    "vit_base_patch14_reg1_tipsv2",
    "vit_base_patch16_224_miil",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_dinov3",
    "vit_base_patch16_dinov3_qkvb",
    "vit_base_patch16_rope_224",
    "vit_base_patch16_rope_mixed_224",
    "vit_base_patch16_rope_reg1_gap_256",
    "vit_base_patch16_rpn_224",
    "vit_base_patch16_sapiens2",
    "vit_base_patch32_siglip_256",
    "vit_base_r26_s32_224",
    "vit_betwixt_patch16_gap_256",
    "vit_betwixt_patch16_rope_reg4_gap_256",
    "vit_dlittle_patch16_reg1_gap_256",
    "vit_dwee_patch16_reg1_gap_256",
    "vit_giant_patch14_224",
    "vit_giant_patch14_clip_224",
    "vit_giant_patch14_dinov2",
    "vit_giant_patch14_reg1_tipsv2",
    "vit_gigantic_patch14_224",
    "vit_gigantic_patch14_clip_224",
    "vit_gigantic_patch14_clip_quickgelu_224",
    "vit_huge_plus_patch16_dinov3",
    "vit_huge_plus_patch16_dinov3_qkvb",
    "vit_intern300m_patch14_448",
    "vit_little_patch16_reg1_gap_256",
    "vit_mediumd_patch16_rope_reg1_gap_256",
    "vit_pe_core_base_patch16_224",
    "vit_pe_core_gigantic_patch14_448",
    "vit_pe_core_large_patch14_336",
    "vit_pe_lang_gigantic_patch14_448",
    "vit_pe_lang_large_patch14_448",
    "vit_pe_spatial_base_patch16_512",
    "vit_relpos_base_patch16_224",
    "vit_relpos_base_patch16_cls_224",
    "vit_relpos_base_patch16_plus_240",
    "vit_relpos_base_patch16_rpn_224",
    "vit_relpos_base_patch32_plus_rpn_256",
    "vit_relpos_medium_patch16_cls_224",
    "vit_small_resnet26d_224",
    "vit_so150m2_patch16_reg1_gap_256",
    "vit_so150m_patch16_reg4_gap_256",
    "vit_so400m_patch14_reg1_tipsv2",
    "vit_so400m_patch14_siglip_224",
    "vit_so400m_patch16_siglip_256",
    "vit_srelpos_medium_patch16_224",
    "vit_wee_patch16_reg1_gap_256",
    "vitamin_base_224",
]
"""One name for all models that differ only in their sizes to a family."""
MODELS = Path(families.__file__).with_name("MODELS.md")


def need(name: str) -> None:
    """Skips a test of a name that the installed timm has not got yet."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")


def narrow(name: str, **options: Any) -> nn.Module:
    """The model of this name with two blocks of 3 heads and width 48, for images of 4 x 4 patches."""
    need(name)
    sizes: dict[str, Any] = {"embed_dim": WIDTH, "num_heads": HEADS, "depth": 2, **options}
    if name.startswith("vitamin"):
        from timm.models.vitamin import VitCfg

        sizes["embed_cfg"] = VitCfg(embed_dim=(16, 32, WIDTH), depths=(1, 1), stem_width=16)
    elif name == "vit_base_mci_224":
        del sizes["embed_dim"]  # that of its stem
    elif "_r" not in name and "_resnet" not in name:
        sizes["patch_size"] = 4
    if "sapiens2" in name:
        sizes["num_kv_heads"] = HEADS
    if not name.endswith("_enc"):
        sizes["num_classes"] = 10
    torch.manual_seed(0)
    with torch.device("meta"):
        draft = backbone_of(timm.create_model(name, **sizes))
    high, wide = family_of(draft).patch_size(draft)
    model = timm.create_model(name, **sizes, img_size=(4 * high, 4 * wide))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # of positions' small networks
    return model


def settings(model: nn.Module) -> str:
    """All that tells a model from others to a family: of its blocks, of its rotary positions and of its kind."""
    backbone = backbone_of(model)
    plain = (bool, int, float, str, tuple, type(None))
    parts = [*family_of(backbone).blocks(backbone), getattr(backbone, "rope", None)]
    own = [
        f"{name}.{key}={value}"
        for part in parts
        if part is not None
        for name, module in part.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, plain) and "drop" not in key
    ]
    kinds = [type(each).__name__ for each in (model, backbone, family_of(backbone).embedding(backbone))]
    text = f"{kinds}{parts}{own}{[tuple(p.shape) for part in parts if part is not None for p in part.parameters()]}"
    return re.sub(r"drop_prob=\S+|DropPath\(\S*\)", "", text)


def images_for(model: nn.Module, dtype: torch.dtype) -> Tensor:
    backbone = backbone_of(model)
    high, wide = family_of(backbone).patch_size(backbone)
    return torch.randn(2, 3, 4 * high, 4 * wide, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    torch.manual_seed(0)  # rotary positions may be drawn anew in each step
    output = model(images)
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum()


EACH = [
    pytest.param(name, marks=[] if number % 12 == 0 else [pytest.mark.full])
    for number, name in enumerate(REPRESENTATIVES)
]
"""A dozenth of them in the short run of the tests."""


@pytest.mark.parametrize("name", EACH)
def test_all_full_is_timms_model_bit_for_bit(name: str) -> None:
    model = narrow(name)
    dense = copy.deepcopy(model)
    executor = attach(model, embeddings="trained")
    executor.activate(SkipPlan(np.full((1, 2, HEADS), FULL, np.uint8), replicas=1), replica=0)
    images = images_for(model, torch.float32)
    with executor.micro_batch(0):
        loss, gradients = loss_and_gradients(model, loss_of(model, images))
    expected_loss, expected = loss_and_gradients(dense, loss_of(dense, images))
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    state, expected_state = model.state_dict(), dense.state_dict()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(value, state[name]) for name, value in expected_state.items())
    assert torch.equal(model.eval()(images), dense.eval()(images))


@pytest.mark.parametrize("name", EACH)
def test_gradients_equal_timms_modules_with_masks(name: str) -> None:
    reference = narrow(name).double()
    if "rope_mixed" in name:
        rope = reference.rope  # computed in float32, for which older versions of timm need the grid so, too
        rope.t_x, rope.t_y = rope.t_x.float(), rope.t_y.float()
    model = copy.deepcopy(reference)
    check_gradients(model, reference, attach(model, embeddings="trained"))


@pytest.mark.parametrize(
    "name",
    [
        "vit_giant_patch14_dinov2",
        "vitamin_base_224",
        "eva02_base_patch14_224",
        pytest.param(
            "deepseek_vit_412m_enc", marks=pytest.mark.full
        ),  # built at its full width, which takes seconds
    ],
)
def test_adapters_run_by_head(name: str) -> None:
    pytest.importorskip("peft")
    reference = narrow(name)
    add_lora(backbone_of(reference), rank=2, alpha=3, dropout=0.0)
    reference = reference.double()
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            if "lora_B" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model = copy.deepcopy(reference)
    check_gradients(model, reference, attach(model))


def check_gradients(model: nn.Module, reference: nn.Module, executor: PlanExecutor) -> None:
    """Of a model under `ROWS`, which the executor is attached to, against another one's modules with masks."""
    executor.activate(SkipPlan(ROWS, replicas=1), replica=0)
    images = images_for(model, torch.float64)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    blocks = family_of(backbone_of(reference)).blocks(backbone_of(reference))
    inner = dict(blocks[0].named_modules())
    outs = [name for name in ("attn.proj", "mlp.fc2", "mlp.w2") if name in inner]
    across = [
        name
        for name, out in (("attn.norm", "attn.proj"), ("mlp.norm", "mlp.fc2"))
        if isinstance(inner.get(name), nn.LayerNorm) and out in inner
    ]
    for slot, row in enumerate(ROWS):
        with executor.micro_batch(slot):
            found = loss_and_gradients(model, loss_of(model, images))
        with masked_blocks(blocks, outs, row, across):
            expected = loss_and_gradients(reference, loss_of(reference, images))
        assert_close(found, expected, trained.__contains__, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", EACH)
def test_smaller_images_are_what_timm_itself_makes_of_them(name: str) -> None:
    model = narrow(name).eval()
    backbone = backbone_of(model)
    family = family_of(backbone)
    high, wide = family.patch_size(backbone)
    images = torch.randn(2, 3, 2 * high, 3 * wide, generator=torch.Generator().manual_seed(1))
    whole = images_for(model, torch.float32)
    if "relpos" in name or name.startswith("beit_"):
        with pytest.raises(UnsupportedModelError, match=r"one image size only.*planner that leaves images"):
            family.take_any_size(backbone)
        return
    with torch.no_grad():
        before = model(whole)
        with family.taking_any_size(backbone):
            given, at_full_size = model(images), model(whole)
        if family.of_any_size(backbone) is backbone:
            expected = model(images)  # which takes any size already
        else:
            dynamic = narrow(name, dynamic_img_size=True)
            dynamic.load_state_dict(model.state_dict())
            expected = dynamic.eval()(images)
        assert torch.equal(model(whole), before)
    torch.testing.assert_close(at_full_size, before, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EACH)
def test_ranks_hold_parts_that_add_up_or_are_refused(name: str) -> None:
    model = backbone_of(narrow(name)).double()
    subnets = SubnetMap.of(model)
    family, block = subnets.family, subnets.blocks(model)[0]
    if family.refuses_parts is not None:
        with pytest.raises(UnsupportedModelError, match="neither tensor parallelism nor a pipeline"):
            check_parts(family)
        return
    x = torch.randn(2, 5, model.embed_dim, dtype=torch.float64)
    whole = family.branches(block, subnets.head_axes)
    if any(branch.across is not None for branch in whole):
        return  # shared blocks refuse them
    every = torch.arange(HEADS)
    sums = [torch.zeros_like(x) for _ in whole]
    for heads in (torch.tensor([0, 2]), torch.tensor([1])):
        part = copy.deepcopy(block)
        cut_block(part, subnets, heads)
        count = heads.numel()
        axes = {key: axis.of(count) for key, axis in subnets.head_axes.items()}
        for total, branch in zip(sums, family.branches(part, axes), strict=True):
            own = torch.arange(count)
            total += branch.out(branch.inner(branch.norm(x), own), own, None).detach()
    for total, branch in zip(sums, whole, strict=True):
        torch.testing.assert_close(total, branch.out(branch.inner(branch.norm(x), every), every, None))


@pytest.mark.parametrize("name", ["eva02_base_patch14_224", "beit_base_patch16_224", "vitamin_base_224"])
def test_costs_are_those_of_timms_model(name: str) -> None:
    model = narrow(name).requires_grad_(True)
    dense = copy.deepcopy(model)
    executor = attach(model, embeddings="trained")
    images = images_for(model, torch.float32)[:1]
    costs = measure_costs(model, executor, tuple(images.shape[1:]))
    with meter() as metered:
        dense(images).sum().backward()
    assert costs.dense_flops == metered.flops
    executor.activate(SkipPlan(ROWS, replicas=1), replica=0)
    with executor.micro_batch(0), meter() as planned:
        model(images).sum().backward()
    assert planned.flops == pytest.approx(costs.planned_flops(ROWS[:1]).item(), rel=0.02)


def answers() -> dict[str, str]:
    """Of the table: by name, the line above it."""
    blocks = [part.partition("\n") for part in MODELS.read_text().split("```")[1].strip().split("\n\n")[1:]]
    return {name: head for head, _, names in blocks for name in names.split()}


def test_the_table_calls_every_name_here_supported() -> None:
    table = answers()
    assert all(": supported" in table[name] for name in REPRESENTATIVES)
    assert len([name for name, answer in table.items() if ": supported" in answer]) >= 275


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_dinov3",
        "qwen3_vit_88m",
        "cait_xxs24_224",
        "swin_tiny_patch4_window7_224",
        "resnet18",
    ],
)
def test_the_table_says_what_the_command_does(name: str) -> None:
    need(name)
    row, answer = support_of(name), answers()[name]
    assert answer.startswith(f"{row.kind}, ")
    assert answer.endswith(f": {row.answer}")


def test_a_part_of_names_finds_them() -> None:
    names = [row.name for row in census("dinov3_qkvb")]
    assert "vit_small_patch16_dinov3_qkvb" in names
    assert names == [row.name for row in census("*dinov3_qkvb*")]
    assert [row.name for row in census("vit_small_patch*dinov3_qkvb")] == ["vit_small_patch16_dinov3_qkvb"]


@pytest.mark.skipif("D2FT_ALL_MODELS" not in os.environ, reason="takes five minutes: D2FT_ALL_MODELS=1")
def test_the_table_is_the_commands_output_and_every_supported_name_is_like_one_here() -> None:
    rows = list(census())
    assert described(rows) == MODELS.read_text().split("```")[1].strip()
    supported = [row for row in rows if row.is_supported]
    assert len(supported) >= 275
    assert sum(row.checkpoints for row in supported) >= 450
    known = {settings(narrow(name)) for name in REPRESENTATIVES}
    assert [row.name for row in supported if settings(narrow(row.name)) not in known] == []


def test_images_in_patches_train_under_plans_and_count_by_their_tokens() -> None:
    model = timm.create_model("naflexvit_base_patch16_gap", embed_dim=48, depth=2, num_heads=3, num_classes=5)
    d2ft = d2ft_hpc.attach(model, planner="joint", compute_budget=0.6)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.01)
    places = torch.cartesian_prod(torch.arange(16), torch.arange(16)).expand(2, -1, -1)
    batch = {
        "patches": torch.randn(2, 256, 16 * 16 * 3),
        "patch_coord": places,
        "patch_valid": torch.ones(2, 256, dtype=torch.bool),
    }
    for _ in range(2):
        model.train()(batch).square().mean().backward()
        optimizer.step()
    assert d2ft.promised_share is not None
    assert d2ft.measured_share == pytest.approx(d2ft.promised_share, rel=0.01)
    for patches in (torch.empty(2, 64, 16 * 16 * 3), torch.empty(2, 64, 16, 16, 3)):
        assert family_of(model).size_of(patches, (3, 256, 256)) == 0.25


def test_what_is_compiled_around_blocks_leaves_images_in_patches_to_the_model() -> None:
    model = timm.create_model("naflexvit_base_patch16_gap", embed_dim=48, depth=2, num_heads=3, num_classes=5)
    batch = {
        "patches": torch.randn(2, 4, 16 * 16 * 3),
        "patch_coord": torch.cartesian_prod(torch.arange(2), torch.arange(2)).expand(2, -1, -1),
        "patch_valid": torch.ones(2, 4, dtype=torch.bool),
    }
    alone = model.train()(batch)
    compile_outside_blocks(model, family_of(model), nullcontext)
    assert torch.equal(model(batch), alone)
