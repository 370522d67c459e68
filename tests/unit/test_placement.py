"""Heads in another order are the same model."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning import head_order, in_order, permute_heads


def small_vit():
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=4,
        num_classes=5,
        init_values=0.1,
        qk_norm=True,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def test_a_permuted_model_is_the_same_function_and_undone_the_same_bits():
    model = small_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model(images)
    owner = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
    order = head_order(owner)
    np.testing.assert_array_equal(order, [[1, 3, 0, 2], [0, 3, 1, 2], [0, 1, 2, 3]])
    permute_heads(model, order)
    assert not torch.equal(model.blocks[0].attn.qkv.weight, before["blocks.0.attn.qkv.weight"])
    qkv = model.blocks[0].attn.qkv.weight.view(3, 4, 6, 24)
    assert torch.equal(qkv[:, 0], before["blocks.0.attn.qkv.weight"].view(3, 4, 6, 24)[:, 1])
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)
    permute_heads(model, np.argsort(order, axis=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_no_permutation_is_refused():
    for order in (np.zeros((3, 4), dtype=int), np.tile(np.arange(4), (2, 1))):
        with pytest.raises(PlanError, match="permutation of 4 heads for each of 3 blocks"):
            permute_heads(small_vit(), order)


def test_heads_in_order_are_divided_evenly():
    np.testing.assert_array_equal(in_order(2, 4, 2), [[0, 0, 1, 1]] * 2)
    with pytest.raises(PlanError, match="4 heads cannot be divided evenly over 3 ranks"):
        in_order(2, 4, 3)
