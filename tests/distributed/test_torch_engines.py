"""DDP and FSDP2 on real ranks against one process (torch_checks.py is what the ranks run)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import torch_checks
from tests.distributed.launching import launches, results_of_checks

pytest.importorskip("peft")


@pytest.fixture(scope="module", params=launches(quick=2, full=[2, 4]))
def results(request: pytest.FixtureRequest) -> dict[str, Any]:
    return results_of_checks(torch_checks, *request.param)


def of_kind(results: dict[str, Any], kind: str) -> dict[str, Any]:
    found = {name: result for name, result in results.items() if name.startswith(kind)}
    assert found
    return found


def test_parameters_equal_one_process_in_fp32(results: dict[str, Any]) -> None:
    """Cut by head, sums come in another order, and AdamW's division shows it: then as near to fp64 as one process."""
    for name, found in of_kind(results, "fp32").items():
        if found["difference"] > 1e-6:
            assert "tp" in name, (name, found)
            assert "adamw" in name, (name, found)
            assert found["own error"] <= 3 * found["one process's error"], (name, found)


def test_bf16_error_is_at_most_twice_the_dense_engines(results: dict[str, Any]) -> None:
    for name, errors in of_kind(results, "bf16").items():
        assert errors["plan"] <= 2 * errors["dense"], name


def test_a_loop_of_ones_own_trains_as_its_plan_says(results: dict[str, Any]) -> None:
    for name, difference in of_kind(results, "loop").items():
        assert difference <= 1e-6, name


def test_attach_plans_and_resumes_a_loop_on_several_ranks(results: dict[str, Any]) -> None:
    if "attach ddp last" not in results:
        pytest.skip("run on 2 ranks")
    for name, found in of_kind(results, "attach").items():
        assert found["difference"] <= 1e-6, name
        assert found["agreed"], name
        assert found["same draw"], name
        assert found["resumed"] <= 1e-6, name
        dense, first, *_ = found["plans"]
        assert dense != first, name


def test_a_resumed_run_is_the_uninterrupted_one(results: dict[str, Any]) -> None:
    """Bitwise under the same engine; else as near as two engines are to each other."""
    for name, found in of_kind(results, "resume").items():
        assert found["difference"] <= (0 if found["same"] else 1e-6), name


def test_torchs_own_checkpoint_goes_on_on_any_mesh_and_runs_no_code(results: dict[str, Any]) -> None:
    for name, found in of_kind(results, "sharded").items():
        assert found["difference"] <= (0 if name.endswith("-> fsdp") else 1e-6), name
        assert "builtins.getattr, which no checkpoint of tensors needs" in found["foreign metadata"]


def test_blocks_that_no_replica_runs_are_not_gathered(results: dict[str, Any]) -> None:
    # Pairs are gathered once and reduced once, each in some micro-batch but where a plan never runs it.
    times_saved = {
        "gathered bytes": {"half": 4, "two blocks": 4},
        "gathered bytes in pairs": {"half": 0, "two blocks": 1},
    }
    for check, of_plan in times_saved.items() if "gathered bytes" in results else ():
        found = results[check]
        assert found["classes of blocks"] == 1  # torch.compile makes kernels for each class anew
        for plan, times in of_plan.items():
            saved = found["dense"]["allgather_base"] - found[plan]["allgather_base"]
            assert saved == times * found["block's weights, forward and backward"]
            reduced = found["dense"]["reduce_scatter_base"] - found[plan]["reduce_scatter_base"]
            assert (reduced > 0) == (times > 0)
        # But for the sum of the squares that a gradient's norm is made of.
        for name, told in found["told"].items():
            assert sum(found[name].values()) == pytest.approx(told, rel=1e-3), name


def test_the_gathered_model_computes_what_the_model_did(results: dict[str, Any]) -> None:
    assert results.get("full model", 0.0) <= 1e-6


def test_fsdp2_takes_what_was_told_of_a_rank_s_share(results: dict[str, Any]) -> None:
    if "bytes to come" in results:
        found = results["bytes to come"]
        assert 0.8 < found["in turn"] < 1.05
        assert 0.9 < found["kept"] < 1.15  # units of half a model, whose messages are not told


def test_ddp_sends_its_gradients_once_a_step(results: dict[str, Any]) -> None:
    if "reduced bytes" in results:
        assert results["reduced bytes"]["counted"] == 3 * [results["reduced bytes"]["ring"]]


def test_what_cannot_run_exactly_is_refused_with_a_fix(results: dict[str, Any]) -> None:
    if "refusals" in results:
        expected = {
            "attached late": "call attach, which freezes some, before DistributedDataParallel",
            "static graph": "remove static_graph",
            "replicas": "the plan is for 3 replicas, the engine has 2",
            "no model": "not a Linear",
            "inner unit": r"Call fully_shard(block)",
            "unit of a block and others": "block 3 together with modules that are no blocks",
            "ddp not prepared": "call d2ft_hpc.prepare(model, executor)",
            "fsdp2 not prepared": "call d2ft_hpc.prepare(model, executor)",
            "3 heads on 2 ranks": "use a divisor of 3",
            "dropout": "attn.qkv.lora_dropout.default",
        }
        for what, fix in expected.items():
            assert fix in results["refusals"][what]
