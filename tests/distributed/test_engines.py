"""DeepSpeed on real ranks against one process (engine_checks.py is what the ranks run)."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from tests.distributed import engine_checks
from tests.distributed.launching import launches, results_of_checks


@pytest.fixture(scope="module", params=launches(quick=2, full=[2]))
def results(request: pytest.FixtureRequest) -> dict[str, Any]:
    return results_of_checks(engine_checks, *request.param)


def of_kind(results: dict[str, Any], kind: str) -> dict[str, Any]:
    return {name: result for name, result in results.items() if name.startswith(kind)}


def test_parameters_equal_one_process_in_fp32(results: dict[str, Any]) -> None:
    differences = of_kind(results, "fp32")
    assert differences
    assert {name: difference for name, difference in differences.items() if not difference <= 1e-6} == {}


def test_bf16_error_is_at_most_twice_the_dense_engines(results: dict[str, Any]) -> None:
    errors = of_kind(results, "bf16")
    assert {name: both for name, both in errors.items() if not both["plan"] <= 2 * both["dense"]} == {}


def test_a_resumed_run_is_the_uninterrupted_one(results: dict[str, Any]) -> None:
    """Bitwise under the same stage; else as near as two stages are to each other."""
    for name, result in of_kind(results, "resume").items():
        _, precision, saved_by, _, resumed_by = name.split()
        if saved_by == resumed_by:
            assert result["difference"] == 0, name
        else:
            assert result["difference"] <= (1e-6 if precision == "fp32" else 2e-2), name


def test_samples_are_scored_by_the_engines_model_between_steps(results: dict[str, Any]) -> None:
    for name, result in of_kind(results, "scoring").items():
        assert result["logits"] <= 1e-5, name
        assert result["parameters"] <= 1e-6, name


def test_a_loop_of_ones_own_trains_as_its_plan_says(results: dict[str, Any]) -> None:
    for name, result in of_kind(results, "user loop").items():
        assert result["parameters"] <= 1e-6, name
        assert result["scores"] <= 1e-4, name
        assert 0.4 < result["planned compute"] <= 0.6, name
        told = re.fullmatch(
            r".*promised (.*)% of the dense compute, measured .*%\n"
            r"3 steps so far: promised (.*)% of the dense compute, measured (.*)%, "
            r"and (.*)% for the scores of heads",
            result["told compute"],
        )
        assert told, result["told compute"]
        now, promised, measured, scores = map(float, told.groups())
        # Of rank 0's 10 samples, 4 give the scores in a dense step.
        assert promised == measured == pytest.approx(0.4 * 100 + 0.6 * now, abs=0.1), name
        assert scores == pytest.approx(0.4 * 30, abs=2), (
            name
        )  # nearly a third of the dense products once more


def test_deepspeeds_checkpoint_goes_on_under_the_same_plans(results: dict[str, Any]) -> None:
    """Bitwise, with replanning every three batches after a dense one."""
    for name, found in of_kind(results, "checkpoint").items():
        assert found["resumed"] == found["plans"], name
        first, second = found["plans"][1], found["plans"][5]
        assert found["plans"] == ["dense", *[first] * 3, "dense", *[second] * 3], name
        assert found["difference"] == 0, name
        assert found["own"] == 7, name
        saved, of_larger_batches = found["so far"]
        assert of_larger_batches == saved, name
        assert re.match(r"\d steps so far: promised ", saved), name


def test_scripts_find_the_models_own_parameters_though_blocks_run_on_flat_ones(
    results: dict[str, Any],
) -> None:
    """And DeepSpeed's checkpoints are the same as without us, before and after."""
    for name, found in of_kind(results, "flat").items():
        assert found["flat"] == 8, name  # one of each block, norm and head
        assert all(found[fact] for fact in ("same", "copied", "names")), name
        assert found["moved"] == found["seen"] == 0, name
        # Moments written by DeepSpeed's own functions, and gradients read by them, are those without us.
        assert max(found[fact] for fact in ("there", "gradients", "kept", "and back")) <= 1e-6, name


def test_weights_that_a_step_gathers_are_there_for_the_next(results: dict[str, Any]) -> None:
    """No gather is left under way: the last to begin may be the first to come."""
    assert 0 < results["gathers"]["begun"] == results["gathers"]["awaited"]


def test_a_step_after_an_incomplete_group_is_that_groups(results: dict[str, Any]) -> None:
    for name, difference in of_kind(results, "boundary").items():
        assert difference <= 1e-6, name


def test_scripts_that_follow_no_plan_are_refused_before_their_step(results: dict[str, Any]) -> None:
    if "mistakes" in results:
        told = results["mistakes"]
        for name in ("without train()", "chosen without train()", "after an evaluation"):
            assert "call engine.train() before the loop" in told[name], name
        assert "call engine(...), not engine.forward or engine.module" in told["by its module"]
        assert "a step of 4 micro-batches, but plans have rows for 2" in told["in larger batches"]


def test_a_loop_of_ones_own_trains_on_drawn_samples(results: dict[str, Any]) -> None:
    for name, result in of_kind(results, "choose").items():
        assert result["share"] == 0.5, name  # of 8 samples; scoring takes the rest of 0.6
        assert result["known"] == 1, name
        assert result["learned"] > 0, name


def test_rows_that_must_be_the_same_are_told_and_others_refused(results: dict[str, Any]) -> None:
    if "one plan for all" in results:
        assert "recomputed" in results["one plan for all"]["why"]
        assert "micro-batch 0" in results["one plan for all"]["refused"]
        assert "Solve a plan for one replica" in results["one plan for all"]["refused"]


def test_deepspeed_still_has_the_undocumented_names_that_we_use(results: dict[str, Any]) -> None:
    for name, result in of_kind(results, "names").items():
        assert result["missing"] == [], name


def test_an_all_full_plan_adds_next_to_nothing_to_a_step(results: dict[str, Any]) -> None:
    """The report's mean loss; under ZeRO 3 whole blocks are gathered instead of their modules, which takes fewer."""
    for name, found in of_kind(results, "overhead").items():
        assert found["ours"]["bytes_sent"] == found["bare"]["bytes_sent"], name
        assert found["ours"]["operators"] <= found["bare"]["operators"] + 4, name  # the mean loss


def test_the_message_model_tells_what_deepspeed_sends(results: dict[str, Any]) -> None:
    for engine, found in of_kind(results, "messages").items():
        counted = Counter[str]()
        for name, sent in found["counted"].items():
            counted[name.removesuffix("_base")] += sent
        told_in_all = sum(found["told"].values())
        assert counted.total() == pytest.approx(told_in_all, rel=1e-3), engine  # a norm's few bytes aside
        for name, told in found["told"].items():
            # DeepSpeed pads to whole parts.
            assert counted[name] == pytest.approx(told, rel=1e-3), (engine, name)


def test_counted_bytes_are_those_of_a_ring_all_reduce_of_the_gradients(results: dict[str, Any]) -> None:
    if "bytes" in results:
        assert results["bytes"]["counted"] == {"allreduce": results["bytes"]["ring"]}
