"""Which tensor-parallel rank holds which head."""

import itertools

import numpy as np
import pytest

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning import in_order, place, solve, spread
from d2ft_hpc.planning.swap_heads import _gain_of_replacing, _Kind
from tests.posing import pose_flat


@pytest.mark.parametrize(("ranks", "speeds"), [(4, None), (2, [1.0, 0.6])])
def test_placement_cuts_the_price_of_lock_step(ranks, speeds):
    scores = np.random.default_rng(3).lognormal(0, 1, (2, 1, 6, 16))
    scores = scores * np.random.default_rng(4).lognormal(0, 0.1, (2, 8, 6, 16))

    def posed(owner):
        return pose_flat(*scores, rank=owner, compute_budget=0.6, device_speed=speeds)

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
