"""The map of subnets onto timm's parameters, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import GatedMlp, RmsNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from d2ft_hpc.errors import UnsupportedModelError
from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.model.subnets import ParameterClass, SubnetMap
from tests.models import DEPTH, HEADS, random_batch, tiny_vit

UNEQUAL = {"mlp_ratio": 4.1}
"""196 hidden units, of which 3 heads get 65, 65 and 66."""


def entries_of(axis: HeadAxis, head: int) -> Tensor:
    """Of the parameter's shape: 1 in the entries that the head owns."""
    parameter = torch.zeros(axis.parameter_shape, requires_grad=True)
    (own,) = torch.autograd.grad(axis.sum_by_head(parameter)[head], parameter)
    return own


@pytest.mark.parametrize("options", [{}, UNEQUAL], ids=["equal shares", "unequal shares"])
def test_every_entry_of_a_subnets_parameters_belongs_to_one_head(options: dict[str, Any]) -> None:
    model = tiny_vit(**options)
    subnets = SubnetMap.of(model)
    assert subnets.shape == (DEPTH, HEADS)
    for _, name, parameter in subnets.parameters(model):
        axis = subnets.head_axes[name]
        assert axis.parameter_shape == parameter.shape
        counts = axis.sum_by_head(torch.ones_like(parameter))
        assert counts.tolist() == axis.entries.tolist()
        assert counts.sum() == parameter.numel()
        own = [entries_of(axis, head).bool() for head in range(HEADS)]
        assert torch.stack(own).sum(0).eq(1).all()
        assert [int(of_head.sum()) for of_head in own] == axis.entries.tolist()
        parts = [axis.select(parameter, torch.tensor([head])) for head in range(HEADS)]
        parts = [part[part != 0] for part in parts]  # what fills unequal shares up
        assert torch.equal(
            torch.cat([part.flatten() for part in parts]).sort().values,
            parameter.detach().flatten().sort().values,
        )


def test_selected_slices_are_timms_rows_and_columns() -> None:
    block = tiny_vit().blocks[0]
    axes = SubnetMap.of(tiny_vit()).head_axes
    dim, units, head = 16, 64, 1
    own = torch.tensor([head])
    qkv = block.attn.qkv.weight.view(3, HEADS, dim, 48)
    assert torch.equal(
        axes["attn.qkv.weight"].select(block.attn.qkv.weight, own), qkv[:, head].reshape(-1, 48)
    )
    assert torch.equal(
        axes["attn.proj.weight"].select(block.attn.proj.weight, own), block.attn.proj.weight[:, 16:32]
    )
    assert torch.equal(
        axes["mlp.fc1.bias"].select(block.mlp.fc1.bias, own), block.mlp.fc1.bias[units : 2 * units]
    )
    assert torch.equal(
        axes["mlp.fc2.weight"].select(block.mlp.fc2.weight, own), block.mlp.fc2.weight[:, 64:128]
    )


@pytest.mark.parametrize("options", [{}, UNEQUAL], ids=["equal shares", "unequal shares"])
def test_a_spread_part_lies_where_it_was_selected(options: dict[str, Any]) -> None:
    model = tiny_vit(**options)
    block = model.blocks[0]
    own = torch.tensor([0, 2])
    for name, axis in SubnetMap.of(model).head_axes.items():
        parameter = block.get_parameter(name).detach()
        spread = axis.spread(axis.select(parameter, own), own)
        assert torch.equal(spread, parameter * (entries_of(axis, 0) + entries_of(axis, 2))), name
        assert torch.equal(axis.select(spread, own), axis.select(parameter, own)), name
        assert spread.shape == parameter.shape
        assert not axis.select(spread, torch.tensor([1])).any(), name


def test_every_parameter_has_a_class() -> None:
    model = tiny_vit(init_values=0.1, qk_norm=True, reg_tokens=1, pre_norm=True, fc_norm=True)
    subnets = SubnetMap.of(model)
    classes = {name: subnets.classify(name) for name, _ in model.named_parameters()}
    for name in ("pos_embed", "cls_token", "reg_token", "patch_embed.proj.weight", "norm_pre.weight"):
        assert classes[name] is ParameterClass.EMBEDDING, name
    for name in ("norm1.weight", "attn.q_norm.weight", "attn.proj.bias", "mlp.fc2.bias", "ls1.gamma"):
        assert classes[f"blocks.0.{name}"] is ParameterClass.SHARED, name
    for name in ("fc_norm.weight", "head.weight"):
        assert classes[name] is ParameterClass.CLASSIFIER, name
    assert classes["blocks.3.attn.qkv.bias"] is ParameterClass.SUBNET


def distilled() -> VisionTransformer:
    return VisionTransformerDistilled(img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3)


@pytest.mark.parametrize(
    "make",
    [
        distilled,
        lambda: tiny_vit(reg_tokens=2, pre_norm=True, fc_norm=True, global_pool="avg"),
        lambda: tiny_vit(global_pool="map", class_token=False, pos_embed="learn"),
        lambda: tiny_vit(no_embed_class=True, reg_tokens=1, dynamic_img_size=True),
    ],
    ids=["distilled DeiT", "registers, pre-norm, fc_norm", "attention pooling", "positions of patches alone"],
)
def test_what_the_first_block_gets_depends_on_embeddings_alone(make: Callable[[], VisionTransformer]) -> None:
    """The gradient of these, and of no others outside the blocks, comes through skips."""
    model = make()
    subnets = SubnetMap.of(model)
    inputs: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(random_batch(0)[0])
    outside = {name: p for name, p in model.named_parameters() if not name.startswith("blocks.")}
    gradients = torch.autograd.grad(inputs[0].sum(), list(outside.values()), allow_unused=True)
    for name, gradient in zip(outside, gradients, strict=True):
        is_below = subnets.classify(name) is ParameterClass.EMBEDDING
        assert is_below == (gradient is not None), name


class _GatedBlock(Block):
    pass


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block_fn": ParallelScalingBlock}, "ParallelScalingBlock"),
        ({"block_fn": _GatedBlock}, "_GatedBlock"),
        ({"mlp_layer": GatedMlp}, "GatedMlp"),
        ({"scale_attn_norm": True, "norm_layer": RmsNorm}, "across heads by attn.norm of class RmsNorm"),
        ({"scale_mlp_norm": True, "norm_layer": RmsNorm}, "across heads by mlp.norm of class RmsNorm"),
    ],
)
def test_models_that_cannot_be_cut_are_refused_by_name(options: dict[str, object], reason: str) -> None:
    model = tiny_vit(**options)
    with pytest.raises(UnsupportedModelError, match=rf"{reason}.*; d2ft-hpc models lists what is of timm's$"):
        SubnetMap.of(model)


def test_other_models_and_replaced_layers_are_refused() -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=r"^torchvision\.models\.vision_transformer\.VisionTransformer is none of the supported models, which "
        r"are timm's VisionTransformer, ",
    ):
        SubnetMap.of(torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16))
    model = tiny_vit()
    model.blocks[2].mlp.fc1 = nn.Sequential(model.blocks[2].mlp.fc1)
    with pytest.raises(UnsupportedModelError, match=r"block 2 has mlp.fc1 of class Sequential"):
        SubnetMap.of(model)


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_224", "vit_small_patch14_dinov2", "deit3_small_patch16_224"]
)
def test_timms_common_models_fit(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    model = timm.create_model(name, num_classes=10)
    assert SubnetMap.of(model).shape == (12, 6)
