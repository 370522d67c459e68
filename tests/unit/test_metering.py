"""Counted FLOPs against formulas and against the plan's promise."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2ft_hpc.errors import PlanError, UnsupportedModelError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.lifecycle import make_plan
from d2ft_hpc.lifecycle.costs import relative_speeds
from d2ft_hpc.metering import measure_costs, meter
from d2ft_hpc.metering.activation_bytes import measure_activation_bytes
from d2ft_hpc.metering.all_reduce import AllReduceSeconds, measure_all_reduce
from d2ft_hpc.metering.profile import profile_passes
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.planning.plan import SkipPlan
from d2ft_hpc.scores import Scores
from tests.models import DEPTH, HEADS, context_of, random_batch, tiny_vit

TOKENS, WIDTH, HEAD_DIM, UNITS = 17, 48, 16, 64


def test_costs_equal_the_formulas_of_a_vit() -> None:
    model = tiny_vit()
    costs = measure_costs(model, attach(model), (3, 16, 16))
    linear = 2 * TOKENS * WIDTH * (4 * HEAD_DIM + 2 * UNITS)
    attention = 2 * 2 * TOKENS * TOKENS * HEAD_DIM
    assert costs.forward_only_flops == linear + attention
    # Each linear layer runs twice more in backward; attention backward recomputes its scores: five products for two.
    assert costs.full_flops == 3 * linear + 3.5 * attention
    patches, classifier = 2 * 16 * (3 * 4 * 4) * WIDTH, 2 * WIDTH * 10
    assert costs.always_flops == patches + 3 * classifier
    assert 0.32 < costs.forward_share < 0.34


@pytest.mark.parametrize("embeddings", ["frozen", "trained"])
def test_a_step_executes_what_the_plan_promises(embeddings: str) -> None:
    model = tiny_vit()
    executor = attach(model, embeddings=embeddings)  # type: ignore[arg-type]
    costs = measure_costs(model, executor, (3, 16, 16))
    rows = np.random.default_rng(1).integers(0, 3, (3, DEPTH, HEADS)).astype(np.uint8)
    rows[:, 0, 0] = 2
    plan = SkipPlan(rows, replicas=1)
    executor.activate(plan, replica=0)
    with meter() as metered:
        for slot in range(3):
            images, labels = random_batch(slot)
            with executor.micro_batch(slot):
                F.cross_entropy(model(images), labels).backward()
    assert metered.flops == costs.planned_flops(rows).sum() * len(labels)
    assert costs.planned_share(plan) == pytest.approx(metered.flops / (3 * len(labels) * costs.dense_flops))
    assert metered.bytes_sent == {}


def frozen(model: VisionTransformer, kind: str) -> list[int]:
    """Freezes part of a model; returns the blocks of which nothing trains."""
    blocks, some = {
        "lower blocks": ([0, 1], ""),
        "upper blocks": ([2, 3], ""),
        "every second block": ([0, 2], ""),
        "qkv": (range(DEPTH), "attn.qkv"),
        "all but norms of lower blocks": ([0, 1], "attn mlp"),
    }[kind]
    for index in blocks:
        for name, parameter in model.blocks[index].named_parameters():
            if any(name.startswith(part) for part in some.split()) or not some:
                parameter.requires_grad_(False)
    return list(blocks) if not some else []


FROZEN = ["lower blocks", "upper blocks", "every second block", "qkv", "all but norms of lower blocks"]


@pytest.mark.parametrize(
    ("kind", "embeddings"),
    [
        *((kind, "frozen") for kind in FROZEN),
        (FROZEN[0], "trained"),
        *(pytest.param(kind, "trained", marks=pytest.mark.full) for kind in FROZEN[1:]),
    ],
)
def test_a_plan_of_a_partly_frozen_model_keeps_its_budget_of_that_model(kind: str, embeddings: str) -> None:
    """Executed FLOPs over those of the dense step of the same model, frozen alike."""
    model, slots = tiny_vit(), 6
    of_frozen = frozen(model, kind)
    executor = attach(model, embeddings=embeddings)  # type: ignore[arg-type]
    costs = measure_costs(model, executor, (3, 16, 16))
    assert np.flatnonzero(~costs.trains).tolist() == of_frozen
    scores = np.random.default_rng(0).uniform(0.1, 1, (slots, DEPTH, HEADS)).astype(np.float32)
    scores[:, of_frozen] = 0  # as where no gradient comes
    context = context_of(PlanConfig(planner="joint", compute_budget=0.6), costs, slots=slots)
    plan = make_plan(context, Scores(scores, scores, seconds=0.0), 0)
    assert (plan.operations[:, of_frozen] == 2).all()

    def executed(of: SkipPlan) -> int:
        executor.activate(of, replica=0)
        with meter() as metered:
            for slot in range(slots):
                images, labels = random_batch(slot)
                with executor.micro_batch(slot):
                    F.cross_entropy(model(images), labels).backward()
        return metered.flops

    dense = executed(SkipPlan.dense(slots, 1, DEPTH, HEADS))
    assert dense == costs.dense_flops * slots * 6
    assert 0.5 < executed(plan) / dense <= 0.6
    assert executed(plan) / dense == pytest.approx(costs.planned_share(plan), abs=0.02)
    executor.bind(None, Reduction.BY_BLOCK)  # under ZeRO 3 the input of a block takes a gradient
    assert executed(SkipPlan.dense(slots, 1, DEPTH, HEADS)) == dense


def test_a_model_with_frozen_blocks_alone_has_nothing_to_plan() -> None:
    model = tiny_vit()
    model.blocks.requires_grad_(False)
    costs = measure_costs(model, attach(model), (3, 16, 16))
    assert costs.always_share == 1
    with pytest.raises(PlanError, match=r"every block is frozen.*plan\.planner=dense"):
        make_plan(context_of(PlanConfig(planner="joint", compute_budget=0.6), costs, slots=2), None, 0)


@pytest.mark.parametrize("inference", [False, True])
def test_flops_are_those_of_torch_s_own_counter(inference: bool) -> None:
    model = tiny_vit()
    images, labels = random_batch(0)
    plain = sdpa_kernel(SDPBackend.MATH)  # torch does not know the processor's attention kernel
    counter = FlopCounterMode(display=False)
    with plain, torch.inference_mode(inference), counter, meter() as metered:
        loss = F.cross_entropy(model(images), labels)
        if not inference:
            loss.backward()
    assert metered.flops == counter.get_total_flops() > 0


def attention_outputs(model: torch.nn.Module) -> list[weakref.ref[torch.Tensor]]:
    """Fills with every forward pass. Attention saves its own output for its backward."""
    references: list[weakref.ref[torch.Tensor]] = []
    for block in model.blocks:
        block.attn.proj.register_forward_pre_hook(
            lambda _, inputs: references.append(weakref.ref(inputs[0]._base))
        )
    return references


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_heads_that_share_keys_count_as_if_each_had_its_own(kernel: str) -> None:
    """The kernels of a GPU, by their shapes."""

    def flops(heads_of_keys: int) -> int:
        query = torch.empty(2, 8, 16, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
        key, value = (
            torch.empty(2, heads_of_keys, 24, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(2)
        )
        attend = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention")
        more = {"flash": (), "efficient": (None, True), "cudnn": (None, True)}[kernel]
        with meter() as metered:
            output = attend(query, key, value, *more)[0]
            torch.autograd.grad(output.sum(), [query, key, value])
        return metered.flops

    expected = 7 * 2 * (2 * 8 * 16 * 24 * 32)
    assert flops(8) == expected
    try:
        assert flops(2) == expected
    except RuntimeError as error:
        if "invalid gradient" not in str(error):
            raise
        pytest.skip(f"this kernel of torch {torch.__version__} takes no shared keys")


def test_the_nearest_size_in_whole_patches_is_named() -> None:
    model = VisionTransformer(img_size=30, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=2)
    with pytest.raises(UnsupportedModelError, match="make the model for 32 x 32"):
        measure_costs(model, attach(model), (3, 30, 30), [0.5, 1.0])


def test_what_is_measured_does_not_stay_in_memory() -> None:
    model = tiny_vit()
    executor = attach(model)
    images, labels = random_batch(0)
    references = attention_outputs(model)
    passes = {
        "metered": lambda: F.cross_entropy(model(images), labels),
        "kept": lambda: measure_activation_bytes(model, executor, (2, 3, 16, 16), torch.float32),
        "profiled": lambda: profile_passes(model, executor, (2, 3, 16, 16), torch.float32),
    }
    for name, run in passes.items():
        with meter():
            run()
            assert references, name
            assert not [each for each in references if each() is not None], name
        references.clear()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_model_without_memory_costs_what_it_will_cost(qk_norm: bool) -> None:
    """Its attention, too, which torch computes otherwise on the meta device."""
    counted = []
    for device in ("cpu", "meta"):
        model = tiny_vit(qk_norm=qk_norm).to(device)
        model.blocks[0].requires_grad_(False)
        counted.append(measure_costs(model, attach(model), (3, 16, 16), sides=(0.5,)))
    for one, other in zip(*[[costs, *costs.at.values()] for costs in counted], strict=True):
        assert one.outside_flops == other.outside_flops
        assert one.full_by_block.tolist() == other.full_by_block.tolist()
        assert one.forward_only_by_block.tolist() == other.forward_only_by_block.tolist()


def test_measuring_costs_leaves_no_trace() -> None:
    model = tiny_vit(proj_drop_rate=0.5).eval()
    executor = attach(model)
    state = torch.get_rng_state()
    measure_costs(model, executor, (3, 16, 16))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert executor.plan is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_timed_passes_leave_no_trace_and_order_the_operations() -> None:
    model = tiny_vit()
    executor = attach(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    passes = profile_passes(model, executor, (64, 3, 16, 16), torch.float32)
    assert 0 < passes.always_seconds < passes.dense_seconds
    assert 0 <= passes.forward_share <= 1
    assert 0 <= passes.always_share < 1
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert executor.plan is None


def test_an_all_reduce_of_one_rank_takes_no_time() -> None:
    assert measure_all_reduce(torch.device("cpu")) == AllReduceSeconds(0.0, 0.0)


def test_small_differences_of_speed_do_not_count() -> None:
    np.testing.assert_allclose(relative_speeds([1.0, 1.04, 1.02]), 1.0)
    speeds = relative_speeds([1.0, 1.03, 2.0, 2.05])
    assert speeds[0] == speeds[1]
    assert speeds[2] == speeds[3]
    assert speeds[0] / speeds[2] == pytest.approx(2.0, rel=0.05)
    assert np.mean(speeds) == pytest.approx(1.0)
