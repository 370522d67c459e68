"""What the engines send under a plan: against a count by hand, one message after the other."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from d2ft_hpc.engines.planned_bytes import PlannedBytes
from d2ft_hpc.errors import PlanError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.parallel.rank_layout import Placement
from d2ft_hpc.planning import SkipPlan, in_order, solve
from d2ft_hpc.planning.communication_volume import (
    LAYOUTS,
    Replicas,
    active_and_full_ranks,
    busiest_shares,
    fsdp2_bytes,
    pipeline_bytes,
    ring_bytes,
    shares_of_senders,
    tensor_parallel_bytes,
)
from d2ft_hpc.planning.step_time import StepTime
from tests.posing import pose_flat


def sent_by_hand(operations, owner, ranks, payload):
    """Total over the ranks, by walking through the messages of the tensor-parallel engine."""
    total = {"forward": 0.0, "backward": 0.0}
    for direction, least in (("forward", 1), ("backward", 2)):
        for row in operations:
            for block, its_operations in enumerate(row):
                active, senders = (
                    {owner[block][head] for head, its in enumerate(its_operations) if its >= kind}
                    for kind in (1, least)
                )
                for _message in ("whole block",) if len(active) == 1 < ranks else ("attention", "FFN"):
                    if len(senders) == 1:
                        total[direction] += (ranks - 1) * payload  # a chain of broadcasts
                    elif senders:
                        total[direction] += ranks * 2 * (ranks - 1) * payload / ranks  # a ring
    return total


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([1, 2, 4]), st.floats(0.0, 1.0))
def test_a_block_sends_only_where_a_head_is_active(seed, ranks, idle):
    generator = np.random.default_rng(seed)
    operations = generator.integers(0, 3, (5, 3, 4)).astype(np.uint8)
    operations[generator.random((5, 3)) < idle] = generator.integers(0, 2)
    owner = np.stack([generator.permutation(row) for row in in_order(3, 4, ranks)])
    sent = tensor_parallel_bytes(operations, owner, ranks, 1000.0)
    by_hand = sent_by_hand(operations, owner, ranks, 1000.0)
    assert sent.forward.sum() * ranks == pytest.approx(by_hand["forward"])
    assert sent.backward.sum() * ranks == pytest.approx(by_hand["backward"])
    assert (sent.forward[(operations == 0).all(axis=2)] == 0).all()
    assert (sent.backward[(operations < 2).all(axis=2)] == 0).all()


def test_an_owner_map_that_does_not_fit_is_refused():
    with pytest.raises(PlanError, match="does not fit 3 blocks x 4 heads on 2 ranks"):
        tensor_parallel_bytes(np.zeros((5, 3, 4), np.uint8), in_order(3, 4, 4), 2, 1.0)


def test_data_parallel_engines_send_what_their_stage_says():
    model = {
        "gradient_bytes": 80.0,
        "parameter_bytes": 100.0,
        "updated_bytes": 80.0,
        "replicas": 4,
        "slots": 3,
    }
    assert Replicas("zero0", **model).bytes_of_step() == {"allreduce": 120.0}
    assert Replicas("zero1", **model).bytes_of_step() == {"allreduce": 120.0, "allgather": 60.0}
    assert Replicas("zero2", **model).bytes_of_step() == {"allreduce": 360.0, "allgather": 60.0}
    assert Replicas("zero3", **model).bytes_of_step() == {"allgather": 225.0, "reduce_scatter": 180.0}
    assert Replicas("zero3", **model, kept_bytes=40.0).bytes_of_step()["allgather"] == 165.0
    assert ring_bytes("allreduce", 100.0, 1) == 0
    assert pipeline_bytes(3, 10.0) == 60.0


def test_fsdp2_gathers_and_reduces_what_some_replica_runs():
    """By hand: 2 slots x 2 replicas, 2 blocks of 10 and 20 bytes, 7 bytes outside; gradients of 5, 6 and 3."""
    gathered, reduced = np.array([10.0, 20.0, 7.0]), np.array([5.0, 6.0, 3.0])
    operations = np.zeros((4, 2, 3), np.uint8)
    assert fsdp2_bytes(operations, 2, gathered, reduced) == {"allgather": 7.0, "reduce_scatter": 3.0}
    operations[1, 0, 2] = 1  # one head of the second replica: both gather block 0 twice in slot 0
    assert fsdp2_bytes(operations, 2, gathered, reduced) == {"allgather": 17.0, "reduce_scatter": 5.5}
    dense = fsdp2_bytes(np.full_like(operations, 2), 2, gathered, reduced)
    assert dense == {"allgather": 67.0, "reduce_scatter": 14.0}
    once = fsdp2_bytes(np.full_like(operations, 2), 2, gathered, reduced, 1, True, True)
    assert once == {"allgather": 18.5, "reduce_scatter": 7.0}
    operations[0, 1, 0] = 2  # slot 0 trains block 1, whose gradient slot 1 reduces, and that of nothing else
    waiting = fsdp2_bytes(operations, 2, gathered, reduced, 1, True, True)
    assert waiting == {"allgather": 18.5, "reduce_scatter": 4.5}
    again = fsdp2_bytes(operations, 2, gathered, reduced, 1, False, True)
    assert again == {"allgather": 32.0, "reduce_scatter": 4.5}
    kept = fsdp2_bytes(np.full_like(operations, 2), 2, gathered, reduced, gathers=1)
    assert kept == {"allgather": 37.0, "reduce_scatter": 14.0}


def test_a_communication_budget_by_meeting_counts_blocks_not_heads():
    operations = np.zeros((4, 2, 4), np.uint8)
    # One rank alone: a broadcast each way for both branches, a quarter of their all-reduces.
    operations[0, 0, 0] = 2
    operations[1, 0, 1:] = 1  # one head a rank is enough for the whole message
    problem = pose_flat(
        np.ones(operations.shape),
        np.ones(operations.shape),
        rank=in_order(2, 4, 2),
        compute_budget=1.0,
        communication_budget=0.5,
        messages="replicated",
    )
    np.testing.assert_allclose(problem.used_communication(SkipPlan(operations, 1)), [0.75, 0.75])
    np.testing.assert_allclose(problem.dense_communication(), [8, 8])
    np.testing.assert_allclose(problem.communication_budget, [4, 4])


def test_a_cluster_plan_is_the_best_of_all_that_limits_allow():
    """Two rows of a block with a head on each of four ranks: every plan is tried whose ranks run in lock step."""
    generator = np.random.default_rng(5)
    for layout in ("replicated", "sharded"):
        problem = pose_flat(
            *np.exp(generator.standard_normal((2, 2, 1, 4))),
            rank=in_order(1, 4, 4),
            compute_budget=0.7,
            communication_budget=0.5,
            messages=layout,
            forward_cost=0.4,
        )
        found = solve(problem, "makespan")
        best = 0.0
        for cells in itertools.product(range(3), repeat=8):
            operations = np.array(cells, np.uint8).reshape(2, 1, 4)
            runs, full = (operations >= 1).sum(axis=2), (operations == 2).sum(axis=2)
            time = 0.4 * (runs > 0).sum() + 0.6 * (full > 0).sum()
            shares = {"sharded": np.array([0, 0.25, 0.5, 9, 1]), "replicated": np.array([0, 0.5, 1, 9, 1])}
            once = np.where(runs == 1, 0.5, 1.0)
            sent = 0.5 * (once * shares[layout][runs]).sum() + 0.5 * (once * shares[layout][full]).sum()
            if time <= 0.7 * 2 + 1e-9 and sent <= 0.5 * 2 + 1e-9:
                best = max(best, problem.objective(operations))
        assert found.objective == pytest.approx(best)
        assert found.bound >= best - 1e-9


def test_few_ranks_run_where_messages_are_scarcer_than_time():
    generator = np.random.default_rng(3)
    scores = np.exp(generator.standard_normal((2, 8, 8, 8)))
    objective, sent = {}, {}
    for layout in ("replicated", "sharded"):
        problem = pose_flat(
            *scores,
            rank=in_order(8, 8, 4),
            compute_budget=0.6,
            communication_budget=0.5,
            messages=layout,
            forward_cost=0.35,
        )
        plan = solve(problem, "makespan")
        objective[layout], sent[layout] = plan.objective, problem.used_communication(plan)
        assert plan.gap < 1e-3
        told = tensor_parallel_bytes(plan.operations, problem.rank, 4, 1.0, layout)
        dense = tensor_parallel_bytes(np.full_like(plan.operations, 2), problem.rank, 4, 1.0, layout)
        share = (told.forward.sum() + told.backward.sum()) / (dense.forward.sum() + dense.backward.sum())
        assert share == pytest.approx(problem.used_communication(plan)[0] / problem.dense_communication()[0])
        assert share <= 0.5 + 1e-9
    running, _ = active_and_full_ranks(plan.operations, problem.rank, 4)
    assert set(np.unique(running)) & {1, 2}
    assert objective["sharded"] > objective["replicated"]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_busiest_link_of_the_sharded_layout_by_hand(ranks):
    """One token a rank; messages counted one after the other, sent and received: tokens first, then sums."""
    for active in range(1, ranks + 1):
        for senders in range(1, active + 1):
            tokens, sums = np.zeros((2, ranks)), np.zeros((2, ranks))  # sent and received
            for head_rank in range(senders):
                for other in set(range(ranks)) - {head_rank}:
                    tokens[0, other] += 1
                    tokens[1, head_rank] += 1
                    sums[0, head_rank] += 1
                    sums[1, other] += 1
            times = 1 if active == 1 else 2
            assert times * (tokens.max() + sums.max()) / ranks == pytest.approx(
                busiest_shares("sharded", ranks)[active, senders]
            )
            sent, dense = times * (tokens[0].sum() + sums[0].sum()), 2 * ranks * (ranks - 1) * 2
            assert sent / dense == pytest.approx(shares_of_senders("sharded", ranks)[active, senders])


def test_the_layout_is_chosen_by_predicted_time():
    """By hand: 2 rows, 1 block, 2 heads on 2 ranks, 100 bytes of activations, a byte a second, 10 s for a FULL head."""
    step_time = StepTime(seconds_per_cost=10.0, activation_bytes=100.0, seconds_per_byte=1.0, latency=3.0)
    layouts = ("replicated", "sharded")
    problem = pose_flat(*np.ones((2, 2, 1, 2)), rank=in_order(1, 2, 2), compute_budget=1.0, forward_cost=0.4)

    def chosen(operations):
        return step_time.fastest(SkipPlan(np.array(operations, np.uint8), 1), problem, layouts)

    # Both ranks FULL: 4 sums a row, in either layout a whole activation each way; the first layout is taken.
    assert chosen([[[2, 2]], [[2, 2]]]) == (pytest.approx(2 * (10 + 4 * 103)), "replicated")
    # One rank alone: a broadcast each way for both branches, or half an activation to the rank and half from it.
    assert chosen([[[2, 0]], [[0, 2]]]) == (pytest.approx(2 * (10 + 2 * 103)), "replicated")
    # One rank trains beside another: as many messages as branches.
    assert chosen([[[2, 1]], [[1, 2]]]) == (pytest.approx(2 * (10 + 4 * 103)), "replicated")
    # Forward alone sends half as much; nothing where nothing runs.
    assert chosen([[[1, 1]], [[0, 0]]]) == (pytest.approx(4 + 2 * 103), "replicated")


def test_halves_of_a_micro_batch_hide_work_behind_half_of_the_messages():
    """By hand, as above: per row a FULL head works 4 s forward and 6 s backward beside messages of 200 s each way."""
    problem = pose_flat(*np.ones((2, 2, 1, 2)), rank=in_order(1, 2, 2), compute_budget=1.0, forward_cost=0.4)
    dense = SkipPlan(np.full((2, 1, 2), 2, np.uint8), 1)
    for seconds_per_byte, latency, chosen in (
        (1.0, 1.0, (2 * 4 * 102, "overlapped")),  # all work is hidden; twice as many messages
        (1.0, 3.0, (2 * (10 + 4 * 103), "replicated")),  # latency costs more than that saves
        (0.02, 0.0, (2 * (10 + 2 * 4 - 2 * 2), "overlapped")),  # half of the messages is
    ):
        step_time = StepTime(
            seconds_per_cost=10.0,
            activation_bytes=100.0,
            seconds_per_byte=seconds_per_byte,
            latency=latency,
        )
        seconds, layout = step_time.fastest(dense, problem, LAYOUTS)
        assert (pytest.approx(seconds), layout) == chosen
    # One rank alone, whose messages of 100 s each way are tokens that come, then sums that leave. By quarters of them:
    # tokens come until 25 and 50; work of 2 and 3 a half goes on from 25 and 50; sums leave from 50 + 2 (or 3) to 77
    # forward and 78 backward.
    alone = SkipPlan(np.array([[[2, 0]], [[0, 2]]], np.uint8), 1)
    step_time = StepTime(seconds_per_cost=10.0, activation_bytes=100.0, seconds_per_byte=1.0, latency=0.0)
    assert step_time.of(alone, problem, "overlapped") == pytest.approx(2 * (77 + 78))


def test_a_boundary_between_stages_takes_time_only_where_something_is_sent():
    step_time = StepTime(seconds_per_cost=1.0, activation_bytes=100.0, seconds_per_byte=1.0, latency=0.0)
    problem = pose_flat(*np.ones((2, 1, 2, 1)), stage=[0, 1], compute_budget=1.0, forward_cost=0.5)
    both = SkipPlan(np.full((1, 2, 1), 2, np.uint8), 1)
    upper = SkipPlan(np.array([[[1], [2]]], np.uint8), 1)
    assert step_time.of(both, problem, "replicated") == pytest.approx(2.0 + 200.0)
    assert step_time.of(upper, problem, "replicated") == pytest.approx(1.5 + 100.0)


def test_what_a_user_s_module_has_around_the_model_is_sent_too() -> None:
    """DDP over two ranks: each sends every gradient once, in float32."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3, num_classes=0
    )
    whole = nn.Sequential(model, nn.Linear(24, 5))
    executor = attach(whole)
    foreseen = PlannedBytes(
        model,
        executor,
        SimpleNamespace(
            placement=Placement.whole(2, 0, *executor.subnets.shape), slots=1, micro_batch_size=1
        ),
        precision="fp32",
        data_parallel="ddp",
        around=whole,
    )
    sent = 4.0 * sum(each.numel() for each in whole.parameters() if each.requires_grad)
    assert foreseen.columns() == {"planned_bytes": sent, "dense_bytes": sent}
