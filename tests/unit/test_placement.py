"""Heads in another order are the same model."""

import itertools

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from d2ft_hpc.errors import PlanError
from d2ft_hpc.model.head_order import place_heads, unplace_heads
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.planning import PlanProblem, head_order, in_order, place, solve, spread
from d2ft_hpc.planning.swap_heads import _gain_of_replacing, _Kind


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


def test_a_placed_model_is_the_same_function_and_undone_the_same_bits():
    model = small_vit()
    subnets = SubnetMap.of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model(images)
    owner = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
    order = head_order(owner)
    np.testing.assert_array_equal(order, [[1, 3, 0, 2], [0, 3, 1, 2], [0, 1, 2, 3]])
    placed = place_heads(model.state_dict(), subnets, order)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(placed["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    qkv = placed["blocks.0.attn.qkv.weight"].view(3, 4, 6, 24)
    assert torch.equal(qkv[:, 0], before["blocks.0.attn.qkv.weight"].view(3, 4, 6, 24)[:, 1])
    model.load_state_dict(placed)
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)
    back = unplace_heads(model.state_dict(), subnets, order)
    assert set(back) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in back.items())


def test_what_is_no_permutation_is_refused():
    model = small_vit()
    for order in (np.zeros((3, 4), dtype=int), np.tile(np.arange(4), (2, 1))):
        with pytest.raises(PlanError, match="permutation of 4 heads for each of 3 blocks"):
            place_heads(model.state_dict(), SubnetMap.of(model), order)


@pytest.mark.parametrize(("ranks", "speeds"), [(4, None), (2, [1.0, 0.6])])
def test_placement_cuts_the_price_of_lock_step(ranks, speeds):
    scores = np.random.default_rng(3).lognormal(0, 1, (2, 1, 6, 16))
    scores = scores * np.random.default_rng(4).lognormal(0, 0.1, (2, 8, 6, 16))

    def posed(owner):
        return PlanProblem.parallel(*scores, rank=owner, compute_budget=0.6, device_speed=speeds)

    plain = posed(in_order(6, 16, ranks))
    owners = {"plain": plain.rank, "spread": spread(plain, ranks), "placed": place(plain, ranks)}
    score = {name: solve(posed(owner), "makespan").objective for name, owner in owners.items()}
    assert score["placed"] >= score["spread"] * (1 - 1e-4)
    assert score["placed"] > score["plain"]
    for block in owners["placed"]:
        assert (np.bincount(block, minlength=ranks) == 16 // ranks).all()
    np.testing.assert_array_equal(owners["placed"], place(plain, ranks))


def test_the_gain_of_a_swap_is_what_the_ranks_best_heads_are_worth_more():
    generator = np.random.default_rng(0)
    owner = np.array([0, 1, 0, 1, 1, 0])
    kind = _Kind(generator.random((4, 6)), np.array([[0, 3], [1, 1], [2, 0], [3, 2]]))

    def worth(owner):
        best = [-np.sort(-kind.value[:, owner == rank], axis=1) for rank in (0, 1)]
        return sum(best[rank][row, : kind.count[row, rank]].sum() for rank in (0, 1) for row in range(4))

    replaced = _gain_of_replacing(owner, kind, 2)
    for one, other in itertools.product(range(6), repeat=2):
        if owner[one] != owner[other]:
            swapped = owner.copy()
            swapped[[one, other]] = owner[[other, one]]
            gain = replaced[one, other] + replaced[other, one]
            assert gain == pytest.approx(worth(swapped) - worth(owner), abs=1e-12)


def test_heads_in_order_are_divided_evenly():
    np.testing.assert_array_equal(in_order(2, 4, 2), [[0, 0, 1, 1]] * 2)
    with pytest.raises(PlanError, match="4 heads cannot be divided evenly over 3 ranks"):
        in_order(2, 4, 3)
