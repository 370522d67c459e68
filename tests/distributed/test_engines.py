"""DeepSpeed on real ranks against one process (engine_checks.py is what the ranks run)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.engine_checks import checks
from tests.distributed.launching import results_of


@pytest.fixture(scope="module", params=[2, 4], ids=lambda ranks: f"{ranks} ranks")
def results(request: pytest.FixtureRequest) -> dict[str, Any]:
    found = results_of("tests.distributed.engine_checks", ranks=request.param)
    assert set(found) == set(checks(request.param))
    return found


def test_parameters_equal_one_process_in_fp32(results: dict[str, Any]) -> None:
    differences = {name: difference for name, difference in results.items() if name.startswith("fp32")}
    assert differences
    assert {name: difference for name, difference in differences.items() if not difference <= 1e-6} == {}


def test_bf16_error_is_at_most_twice_the_dense_engines(results: dict[str, Any]) -> None:
    for name, errors in results.items():
        if name.startswith("bf16"):
            assert errors["plan"] <= 2 * errors["dense"], name


def test_counted_bytes_are_those_of_a_ring_all_reduce_of_the_gradients(results: dict[str, Any]) -> None:
    if "bytes" in results:
        assert results["bytes"]["counted"] == {"allreduce": results["bytes"]["ring"]}
