"""What the engines send under a plan: against a count by hand, one message after the other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning import PlanProblem, SkipPlan, in_order
from d2ft_hpc.planning.messages import Replicas, pipeline_bytes, ring_bytes, tensor_parallel_bytes


def sent_by_hand(operations, owner, ranks, payload):
    """Total over the ranks, by walking through the messages of the tensor-parallel engine."""
    total = {"forward": 0.0, "backward": 0.0}
    for direction, least in (("forward", 1), ("backward", 2)):
        for row in operations:
            for block, its_operations in enumerate(row):
                senders = {owner[block][head] for head, its in enumerate(its_operations) if its >= least}
                for _branch in ("attention", "FFN"):
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
    assert Replicas("zero3", **model).bytes_of_step() == {"allgather": 450.0, "reduce_scatter": 180.0}
    assert Replicas("fsdp2", **model, gathers=1).bytes_of_step()["allgather"] == 75.0
    assert Replicas("fsdp2", **model).meets_every_block
    assert not Replicas("zero2", **model).meets_every_block
    assert ring_bytes("allreduce", 100.0, 1) == 0
    assert pipeline_bytes(3, 10.0) == 60.0


def test_a_communication_budget_by_meeting_counts_blocks_not_heads():
    operations = np.zeros((4, 2, 4), np.uint8)
    operations[0, 0, 0] = 2  # one head is enough for the whole message
    operations[1, 0, 1:] = 1
    problem = PlanProblem.parallel(
        np.ones(operations.shape),
        np.ones(operations.shape),
        rank=in_order(2, 4, 2),
        compute_budget=1.0,
        communication_budget=0.5,
        messages="by_meeting",
    )
    np.testing.assert_allclose(problem.used_communication(SkipPlan(operations, 1)), [1.5, 1.5])
    np.testing.assert_allclose(problem.dense_communication(), [8, 8])
    np.testing.assert_allclose(problem.communication_budget, [4, 4])
