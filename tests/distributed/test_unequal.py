"""Ranks that differ in speed, on real ranks (unequal_checks.py is what they run)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.launching import results_of

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return results_of("tests.distributed.unequal_checks", ranks=2)


def test_the_next_plan_gives_less_to_the_rank_that_was_slower(results: dict[str, Any]) -> None:
    for slow in (0, 1):
        found = results["speeds"][f"rank {slow} sleeps"]
        assert found["speeds"][slow] < found["speeds"][1 - slow]
        assert found["work"][slow] < found["work"][1 - slow]


def test_a_block_that_no_replica_trains_is_not_reduced_without_zero(results: dict[str, Any]) -> None:
    sent, (block,) = results["blocks"], results["blocks"]["of block 1"]
    assert sent["zero0"][0] - sent["zero0"][1] == pytest.approx(
        block, rel=1e-3
    )  # two ranks send as much as it has
    assert sent["zero1"][0] == sent["zero1"][1]
