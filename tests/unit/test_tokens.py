"""Resolution as an axis of plans: the curve over a run, plans that hold grids, models that train on scaled images."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from d2ft_hpc.errors import PlanError, UnsupportedModelError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.image_scaling import scaled
from d2ft_hpc.metering import measure_costs, meter
from d2ft_hpc.metering.flops import token_curve_of
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.planning import Operation, SkipPlan
from d2ft_hpc.planning.token_curve import TokenCurve, token_curve
from d2ft_hpc.planning.tokens import grids_of
from d2ft_hpc.user_loop.attached import is_on_the_way

GRIDS = [(8, 8), (12, 12), (16, 16)]
COSTS = [0.24, 0.54, 1.0]
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def _vit(**more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = timm.create_model("vit_tiny_patch16_224", **{**TINY, **more}).double()
    return model


@pytest.mark.parametrize("budget", [0.24, 0.25, 0.4, 0.5, 0.593, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 108, 2345])
def test_a_curve_keeps_its_budget_and_leaves_no_step_of_it(budget: float, steps: int) -> None:
    curve = token_curve(GRIDS, COSTS, budget, [32] * steps)
    spent = float(np.dot(curve.steps, COSTS))
    assert sum(curve.steps) == steps
    assert curve.share == pytest.approx(spent / steps)
    assert spent <= budget * steps + 1e-6
    rises = [
        COSTS[above] - COSTS[below]
        for below, above in itertools.combinations(range(3), 2)
        if curve.steps[below]
    ]
    assert not rises or budget * steps - spent < min(rises) + 1e-6
    grids = [curve.grid_at(step) for step in range(steps)]
    assert grids == sorted(grids)
    assert [grids.count(grid) for grid in GRIDS] == list(curve.steps)


@pytest.mark.parametrize("rest", [1, 8, 31])
@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
def test_a_curve_reckons_with_the_small_batches_at_the_ends_of_epochs(epochs: int, rest: int) -> None:
    """Counted in samples, what is left of the budget is less than any step would take more."""
    samples = ([32] * 6 + [rest]) * epochs
    curve = token_curve(GRIDS, COSTS, 0.6, samples)
    costs = np.repeat(COSTS, curve.steps)
    spent = float(np.dot(samples, costs)) / sum(samples)
    assert curve.share == pytest.approx(spent)
    assert 0.6 - 32 / sum(samples) * (COSTS[2] - COSTS[1]) < spent <= 0.6 + 1e-9
    for below, above in itertools.combinations(range(3), 2):
        more = list(curve.steps)
        if more[below]:
            more[below], more[above] = more[below] - 1, more[above] + 1
            assert np.dot(samples, np.repeat(COSTS, more)) > 0.6 * sum(samples)


def test_a_curve_spreads_steps_as_evenly_as_the_budget_allows() -> None:
    """Against a search over all shares of a fine grid."""
    budget, parts = 0.45, 400
    most = max(
        _entropy(shares)
        for i in range(parts + 1)
        for j in range(parts + 1 - i)
        if np.dot(shares := (i / parts, j / parts, (parts - i - j) / parts), COSTS) <= budget
    )
    curve = token_curve(GRIDS, COSTS, budget, [1] * 100_000)
    assert most - 1e-4 <= _entropy([steps / 100_000 for steps in curve.steps]) <= most + 1e-3


def _entropy(shares: Sequence[float]) -> float:
    return -sum(share * np.log(share) for share in shares if share > 0)


def test_a_curve_in_words() -> None:
    grids, patch = ((2, 2), (4, 4)), (8, 8)
    told = {(3, 2): "for 3, 32 x 32 pixels for 2 steps", (3, 1): "for 3, 32 x 32 pixels for 1 step"}
    told |= {(1, 0): "for 1 step, 32 x 32 pixels for none"}
    for steps, words in told.items():
        assert TokenCurve(grids, steps, 0.5).in_words(patch) == f"16 x 16 pixels {words}"


def test_a_budget_below_the_smallest_images_is_refused_with_the_least_one() -> None:
    with pytest.raises(PlanError, match=r"budget 0\.2 is below .* 8 x 8 patches .*; at least 0\.240"):
        token_curve(GRIDS, COSTS, 0.2, [1] * 100)


def test_a_training_ends_on_the_way_unless_its_images_are_full_or_its_budget_s_last() -> None:
    assert [is_on_the_way(grid, token_curve(GRIDS, COSTS, 0.5, [1] * 100)) for grid in GRIDS] == [
        True,
        True,
        False,
    ]
    assert [is_on_the_way(grid, token_curve(GRIDS, COSTS, 0.24, [1] * 100)) for grid in GRIDS] == [
        False,
        True,
        False,
    ]


def test_sides_are_whole_patches_and_end_at_full_size() -> None:
    assert grids_of((14, 14), (0.5, 0.75, 1.0)) == [(7, 7), (10, 10), (14, 14)]
    assert grids_of((16, 12), (0.5,)) == [(8, 6), (16, 12)]
    assert grids_of((2, 2), (0.1, 0.2)) == [(1, 1), (2, 2)]


def test_a_plan_keeps_its_grids_as_message_and_as_file(tmp_path: Path) -> None:
    plain = SkipPlan.dense(2, 2, 3, 3)
    plan = plain.at((3, 2))
    assert plan != plain
    assert plan.at(None) == plain
    assert plan.at((4, 2)) != plan
    assert plan.grid_of(3) == (3, 2)
    assert plain.grid_of(3) is None
    again = SkipPlan.from_bytes(plan.to_bytes())
    assert again == plan
    assert again.grid_of(0) == (3, 2)
    plan.write(tmp_path / "plan.h5")
    assert SkipPlan.read(tmp_path / "plan.h5").digest == plan.digest
    for wrong in (np.ones((3, 2), int), np.zeros((4, 2), int), np.ones((4, 2)), np.full((4, 2), 10**6)):
        with pytest.raises(PlanError, match="grids"):
            SkipPlan(plan.operations, 2, grids=wrong)


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"pos_embed": "none"}])
def test_scaled_training_is_that_of_timms_model_on_small_images(options: dict[str, object]) -> None:
    model, reference = _vit(**options), _vit(dynamic_img_size=True, **options)
    executor = attach(model)
    images, labels = torch.rand(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    grids = [(2, 2), (4, 4), (3, 2)]
    plan = SkipPlan(np.full((3, 3, 3), Operation.FULL), 1, grids=np.array(grids))
    executor.activate(plan, 0)
    model.train()
    for slot, (down, across) in enumerate(grids):
        with executor.micro_batch(slot):
            own = F.cross_entropy(model(images), labels)
            own.backward()
        expected = F.cross_entropy(reference(scaled(images, (8 * down, 8 * across))), labels)
        expected.backward()
        assert own.item() == expected.item()
    of_reference = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, of_reference[name].grad), name
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images), reference.eval()(images))


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_rotary_positions_are_those_of_the_small_images(name: str) -> None:
    try:
        model = timm.create_model(
            name, img_size=64 if "16" in name else 56, embed_dim=48, depth=2, num_heads=3
        )
    except RuntimeError as error:
        pytest.skip(f"this timm does not know it: {error}")
    if not model.dynamic_img_size:
        model = timm.create_model(
            name, img_size=56, embed_dim=48, depth=2, num_heads=3, dynamic_img_size=True
        )
    reference = copy.deepcopy(model).train()
    executor = attach(model.train())
    patch = executor.subnets.family.patch_size(model)[0]
    executor.activate(SkipPlan.dense(1, 1, 2, 3).at((2, 3)), 0)
    images = torch.rand(2, 3, 4 * patch, 4 * patch)
    with executor.micro_batch(0):
        logits = model(images)
    assert torch.equal(logits, reference(scaled(images, (2 * patch, 3 * patch))))


def test_images_are_scaled_while_the_model_trains_whatever_the_mode_of_what_embeds_them() -> None:
    """Somebody may leave frozen modules as in evaluation."""
    model, reference = _vit(), _vit(dynamic_img_size=True)
    executor = attach(model)
    executor.activate(SkipPlan.dense(1, 1, 3, 3).at((2, 2)), 0)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    model.train().patch_embed.eval()
    with executor.micro_batch(0):
        assert torch.equal(model(images), reference.train()(scaled(images, (16, 16))))
    model.eval().patch_embed.train()
    assert torch.equal(model(images), reference.eval()(images))


def test_copies_of_a_model_under_such_a_plan_train_on_images_as_they_come() -> None:
    model = _vit()
    executor = attach(model)
    executor.activate(SkipPlan.dense(1, 1, 3, 3).at((2, 2)), 0)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.train()(images), model.eval()(images))


def test_skipped_heads_and_small_images_go_together() -> None:
    """Against a model of its own for the small images, under the same plan."""
    operations = np.random.default_rng(0).integers(0, 3, (1, 3, 3))
    plan = SkipPlan(operations, 1)
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    outputs = []
    for options, own, seen in (
        ({}, plan.at((2, 2)), images),
        ({"dynamic_img_size": True}, plan, scaled(images, (16, 16))),
    ):
        model = _vit(**options).train()
        executor = attach(model)
        executor.activate(own, 0)
        with executor.micro_batch(0):
            outputs.append(model(seen))
    assert torch.equal(*outputs)


def test_costs_at_each_resolution_are_what_a_pass_computes() -> None:
    model = _vit()
    executor = attach(model)
    costs = measure_costs(model, executor, (3, 32, 32), (0.5, 0.75))
    assert list(costs.at) == [(2, 2), (3, 3), (4, 4)]
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    model.train()
    for grid in costs.at:
        plan = SkipPlan(np.array([[[2, 2, 0], [2, 1, 1], [2, 0, 0]]]), 1).at(grid)
        executor.activate(plan, 0)
        with executor.micro_batch(0), meter() as metered:
            model(images).sum().backward()
        assert metered.flops == pytest.approx(2 * costs.of_replica(plan, 0)[0], rel=1e-9)
    curve = token_curve_of(costs, 0.6, [1] * 100)
    assert curve.share == pytest.approx(0.6, abs=0.01)
    with pytest.raises(
        PlanError, match=r"1 x 1 patches, whose costs were not counted; this run has 2 x 2, 3 x 3"
    ):
        costs.planned_share(plan.at((1, 1)))


def test_budgets_of_tokens_and_of_heads_share_what_the_run_has() -> None:
    assert PlanConfig(compute_budget=0.5).token_share == 0.5
    assert PlanConfig(planner="joint", compute_budget=0.5).token_share is None
    assert PlanConfig(planner="joint", compute_budget=0.5, token_budget=0.8).token_share == 0.8
    assert PlanConfig(file="plan.h5", compute_budget=0.5).token_share is None
    for settings, told in (
        ({"token_budget": 0.8}, "token_budget=0.8: with planner=tokens it is compute_budget; remove it"),
        ({"planner": "samples", "token_budget": 0.8}, "planner=samples trains on images of full size"),
        ({"planner": "joint", "file": "plan.h5", "token_budget": 0.8}, "file=plan.h5 .* full size"),
        ({"planner": "joint", "compute_budget": 0.6, "token_budget": 0.5}, "leave the heads nothing to skip"),
    ):
        with pytest.raises(ValueError, match=told):
            PlanConfig(**settings)


def test_maps_of_intermediate_tokens_are_those_of_the_small_images() -> None:
    model, reference = _vit().train(), _vit(dynamic_img_size=True).train()
    executor = attach(model)
    executor.activate(SkipPlan.dense(1, 1, 3, 3).at((2, 3)), 0)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    for seen in (scaled(images, (16, 24)), images):
        with executor.micro_batch(0):
            _, own = model.forward_intermediates(images)
        _, expected = reference.forward_intermediates(seen)
        assert all(map(torch.equal, own, expected))
        model.eval(), reference.eval()


def test_images_that_are_no_whole_patches_are_refused_with_the_size_that_is() -> None:
    model = _vit(img_size=30)  # timm's leaves the last pixels out, but only of images of this size
    executor = attach(model)
    measure_costs(model, executor, (3, 30, 30))
    with pytest.raises(UnsupportedModelError, match=r"30 x 30 pixels .* patches of 8 x 8, .* for 32 x 32"):
        measure_costs(model, executor, (3, 30, 30), (0.5,))


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["qkv", "proj"]}, {"target_modules": ["qkv"], "modules_to_save": ["patch_embed"]}],
)
def test_what_peft_makes_of_the_patches_takes_small_images_too(settings: dict[str, list[str]]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(_vit(), peft.LoraConfig(r=2, **settings))
    reference = peft.get_peft_model(_vit(dynamic_img_size=True), peft.LoraConfig(r=2, **settings))
    executor = attach(model.train())
    executor.activate(SkipPlan.dense(1, 1, 3, 3).at((2, 3)), 0)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with executor.micro_batch(0):
        assert torch.equal(model(images), reference.train()(scaled(images, (16, 24))))
    assert executor.subnets.family.image_shape(model.base_model.model) == (3, 32, 32)


def test_a_hybrid_scales_the_images_of_its_stem() -> None:
    """Whose patches are those of the convolutions below and its own together."""
    model = timm.create_model("vit_small_r26_s32_224", img_size=64, embed_dim=24, depth=2, num_heads=3)
    reference = copy.deepcopy(model).train()
    executor = attach(model.train())
    assert executor.subnets.family.image_shape(model) == (3, 64, 64)
    executor.activate(SkipPlan.dense(1, 1, 2, 3).at((1, 2)), 0)
    executor.subnets.family.take_any_size(reference)
    images = torch.rand(2, 3, 64, 64)
    with executor.micro_batch(0):
        assert torch.equal(model(images), reference(scaled(images, (32, 64))))


def test_a_model_for_one_size_is_refused_by_name() -> None:
    model = timm.create_model("beit_base_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=3)
    executor = attach(model)
    with pytest.raises(UnsupportedModelError, match="one image size only"):
        executor.activate(SkipPlan.dense(1, 1, *executor.subnets.shape).at((1, 1)), 0)
