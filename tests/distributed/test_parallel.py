"""Pipelines and tensor-parallel groups on real ranks against one process (parallel_checks.py is what the ranks run)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import parallel_checks
from tests.distributed.launching import launches, results_of_checks
from tests.distributed.parallel_checks import SLOTS
from tests.models import DEPTH


@pytest.fixture(scope="module", params=launches(quick=2, full=[4]))
def results(request: pytest.FixtureRequest) -> dict[str, Any]:
    return results_of_checks(parallel_checks, *request.param)


def test_parameters_equal_one_process_in_fp32(results: dict[str, Any]) -> None:
    differences = {name: result for name, result in results.items() if name.startswith("fp32")}
    assert differences
    assert {name: difference for name, difference in differences.items() if not difference <= 1e-6} == {}


def test_bf16_error_is_at_most_twice_the_dense_engines(results: dict[str, Any]) -> None:
    errors = {name: result for name, result in results.items() if name.startswith("bf16")}
    assert errors
    assert {name: both for name, both in errors.items() if not both["plan"] <= 2 * both["dense"]} == {}


def test_gradients_that_never_come_are_zeros_on_every_replica(results: dict[str, Any]) -> None:
    """In a bf16 pipeline without ZeRO, all of whose ranks clip by one norm then."""
    found = results["missing gradients"]
    for ranks, one_process in zip(found["ranks"], found["one process"], strict=True):
        assert len(set(ranks)) == 1
        assert ranks == pytest.approx(one_process * len(ranks), rel=0.02)


def test_samples_are_scored_by_the_cut_model_itself(results: dict[str, Any]) -> None:
    """As planner `samples` does before each step; all ranks of a replica get the same logits, bit for bit."""
    scoring = {name: result for name, result in results.items() if name.startswith("scoring")}
    assert scoring
    for name, result in scoring.items():
        assert result["logits"] <= 1e-5, name
        assert result["parameters"] <= 1e-6, name
        assert result["different logits in a replica"] == 0, name


def test_a_loop_of_ones_own_trains_a_cut_model_as_its_plan_says(results: dict[str, Any]) -> None:
    loops = {name: result for name, result in results.items() if name.startswith("user loop")}
    assert loops
    for name, result in loops.items():
        assert result["parameters"] <= 1e-6, name
        assert result["scores"] <= 1e-4, name
        assert result["skipped"] > 0.2, name


def test_tensor_parallel_messages_follow_the_plan(results: dict[str, Any]) -> None:
    """A sum after each branch forward, and one before it backward; none where the plan leaves nothing to send."""
    if "messages" in results:
        sent, one_sum = results["messages"]["sent"], results["messages"]["one sum"]
        sums = (
            2 * DEPTH * SLOTS
        )  # one a branch, forward; over two ranks each byte is sent once, half of it in a broadcast
        assert sent["shortcut"].get("allreduce", 0) == 0
        assert sent["forward only"] == {"allreduce": sums * one_sum}
        assert sent["full"] == {"allreduce": 2 * sums * one_sum}
        norms_and_row_biases = 6 * 48 * 4  # of a block, in bytes: the rank's gradients, once a step
        assert sent["one head"]["allreduce"] == DEPTH * norms_and_row_biases
        assert sent["one head"]["broadcast"] == sums * one_sum / 2  # one a block: the rank runs both branches


def test_a_lone_senders_tensor_reaches_every_rank(results: dict[str, Any]) -> None:
    """On more than two ranks over gloo along a chain of them."""
    assert len(results["lone senders"]) >= 4
    assert all(results["lone senders"])


def test_what_is_sent_is_what_the_message_model_says(results: dict[str, Any]) -> None:
    """Under every kind of plan, except what no plan changes: losses, norms, shapes of a pipeline's messages."""
    sent = {name: result for name, result in results.items() if name.startswith("sent")}
    assert sent
    for name, of_kinds in sent.items():
        unchanged = of_kinds["full"]["counted"] - of_kinds["full"]["told"]
        assert 0 <= unchanged <= 10_000, name
        for kind, both in of_kinds.items():
            # Each message's bytes on a ring are rounded; runs of 17 tokens that differ by one count as equal.
            rounded = 400 + ("replicated" not in name) * both["told"] / 17
            assert both["counted"] - both["told"] == pytest.approx(unchanged, abs=rounded), (name, kind)
    for layout in ("pp2 tp2 replicated", "pp2 tp2 sharded"):
        if (of_kinds := sent.get(f"sent {layout}")) is not None:
            # Nothing below the boundary is FULL in any micro-batch: no gradient comes back.
            assert of_kinds["whole stages"]["told"] < 0.6 * of_kinds["full"]["told"]
