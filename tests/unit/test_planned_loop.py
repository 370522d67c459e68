"""`d2ft_hpc.attach`: plans, checkpoints and counters of a loop of one's own, in one process."""

from __future__ import annotations

import copy
import gc
import io
import math
import re
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

import d2ft_hpc
from d2ft_hpc import results
from d2ft_hpc.engines.deepspeed_private import import_deepspeed
from d2ft_hpc.errors import CheckpointError, ConfigError, PlanError, UnsupportedModelError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.lifecycle import make_plan
from d2ft_hpc.metering import measure_costs
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.score_table import WEIGHT_MAGNITUDE
from d2ft_hpc.scores import Scores, gradient_scores, scores_of_weights
from d2ft_hpc.user_loop.attached import tell_of_graphs
from d2ft_hpc.user_loop.batch_counter import samples_in
from d2ft_hpc.user_loop.choosing import choose_from
from tests.models import CLASSES, DEPTH, HEADS, context_of, random_batch, tiny_vit

SLOTS = 3


class Loop:
    """A dense loop that somebody wrote, with what d2ft adds."""

    def __init__(
        self, weights: int = 0, wrap: Any = None, num_classes: int = CLASSES, **settings: Any
    ) -> None:
        self.model: Any = tiny_vit(weights, num_classes=num_classes)
        if wrap is not None:
            self.model = wrap(self.model)
        self.d2ft = d2ft_hpc.attach(self.model, **{"micro_batches": SLOTS, **settings})
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)
        self.model.train()

    def step(self, step: int, slots: int = SLOTS) -> float:
        total = 0.0
        for slot in range(slots):
            images, labels = random_batch(10 * step + slot, samples=12)
            if self.d2ft.section.planner == "samples":
                images, labels = self.d2ft.choose(images, labels)
            loss = F.cross_entropy(self.model(images), labels)
            self.d2ft.record.loss(loss)
            loss /= slots  # in its place, of which the record must know nothing
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def test_the_first_batch_gives_the_scores_of_the_plan_that_the_next_ones_follow() -> None:
    loop, twin = Loop(planner="joint"), tiny_vit()
    executor = attach(twin)
    costs = measure_costs(twin, executor, (3, 16, 16))
    pairs = [random_batch(slot, samples=12) for slot in range(SLOTS)]
    fisher = np.concatenate(
        [
            gradient_scores(twin, executor.subnets, *pair, F.cross_entropy, ["fisher"])["fisher"].numpy()
            for pair in pairs
        ]
    )
    assert loop.d2ft.plan is None
    dense = sum(F.cross_entropy(twin(images), labels).item() / SLOTS for images, labels in pairs)
    assert loop.step(0) == pytest.approx(dense, rel=1e-6)
    magnitude = scores_of_weights(WEIGHT_MAGNITUDE, loop.model, loop.d2ft.executor.subnets).numpy()
    scores = Scores(fisher, np.broadcast_to(magnitude, fisher.shape), 0.0)
    context = context_of(PlanConfig(planner="joint", compute_budget=0.6), costs, slots=SLOTS)
    assert loop.d2ft.plan == make_plan(context, scores, 0)
    assert loop.d2ft.measured_share is None
    loop.step(1)
    assert loop.d2ft.promised_share == pytest.approx(0.6, abs=0.02)
    assert loop.d2ft.measured_share == pytest.approx(loop.d2ft.promised_share, rel=1e-9)
    now, so_far = loop.d2ft.report().splitlines()
    assert now.startswith("planner joint, ")
    assert f"promised {loop.d2ft.promised_share:.1%} of the dense compute, measured" in now
    share = (1 + loop.d2ft.promised_share) / 2
    # Squares of all weights' gradients, whose products a dense batch computes once already.
    weights = sum(
        p.numel() for n, p in twin.blocks.named_parameters() if n.endswith("weight") and "norm" not in n
    )
    scores = 2 * weights * twin.pos_embed.shape[1] / costs.dense_flops / 2
    assert so_far == (
        f"2 steps so far: promised {share:.1%} of the dense compute, measured {share:.1%}, and {scores:.1%} for the "
        f"scores of heads"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"planner": "joint", "replan": {"every": "2 steps"}},
        pytest.param(
            {"planner": "random", "seed": 3, "replan": {"every": "2 steps"}}, marks=pytest.mark.full
        ),
        pytest.param({"planner": "samples", "compute_budget": 0.7}, marks=pytest.mark.full),
    ],
)
def test_a_loop_resumed_between_any_batches_goes_on_as_it_was(settings: dict[str, Any]) -> None:
    steps = 5
    whole = Loop(**settings)
    states, losses, plans = [], [], []
    for step in range(steps):
        saved = io.BytesIO()
        parts = {"model": whole.model, "optimizer": whole.optimizer, "d2ft": whole.d2ft}
        torch.save({name: part.state_dict() for name, part in parts.items()}, saved)
        states.append(saved.getvalue())
        losses.append(whole.step(step))
        plans.append(whole.d2ft.plan)
    different = {plan.hash for plan in plans if plan is not None}
    assert len(different) == {"joint": 2, "random": 3, "samples": 1}[settings["planner"]]
    for begun, state in enumerate(states):
        resumed = Loop(weights=1, **settings)
        for name, content in torch.load(io.BytesIO(state), weights_only=True).items():
            getattr(resumed, name).load_state_dict(content)
        again = [(resumed.step(step), resumed.d2ft.plan) for step in range(begun, steps)]
        assert again == list(zip(losses[begun:], plans[begun:], strict=True)), begun


def test_samples_are_drawn_within_the_budget_and_never_forgotten() -> None:
    loop = Loop(planner="samples", compute_budget=0.7)
    images, labels = random_batch(0, samples=12)
    with pytest.raises(PlanError, match=r"images, labels = d2ft\.choose\(images, labels\)"):
        loop.model(images)
    chosen, targets = loop.d2ft.choose(images, labels)
    assert len(chosen) == len(targets) < 12
    assert all(any(torch.equal(each, image) for image in images) for each in chosen)
    loop = Loop(planner="samples", compute_budget=0.7, micro_batches=1)
    loop.step(0, slots=1)
    assert 0.5 < loop.d2ft.promised_share <= 0.7
    assert loop.d2ft.measured_share == pytest.approx(loop.d2ft.promised_share, rel=0.01)
    with pytest.raises(PlanError, match="'joint' train on all"):
        Loop(planner="joint").d2ft.choose(images, labels)
    loop.model.eval()
    with pytest.raises(
        PlanError, match=r"VisionTransformer is in evaluation mode: call model\.train\(\) before"
    ):
        loop.d2ft.choose(images, labels)
    loop.model.train()
    loop.step(1, slots=1)


def test_batches_end_with_the_optimiser_s_step_or_where_it_is_left_out() -> None:
    loop = Loop(planner="random", seed=1)
    loop.step(0, slots=SLOTS - 1)  # the last of an epoch
    images, _ = random_batch(0)
    for slot in (0, 1, 2, 0, 1):  # of which a gradient scaler leaves the optimiser's step out
        loop.model(images)
        assert loop.d2ft.current_slot() == slot
    with torch.no_grad():
        loop.model(images)
    loop.model.eval()
    loop.model(images)
    assert loop.d2ft.current_slot() == 1
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).step()  # of another model
    assert loop.d2ft.current_slot() == 1


def test_scores_are_taken_from_whole_batches_of_finite_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    loop = Loop(planner="joint")
    loop.step(0, slots=SLOTS - 1)
    assert loop.d2ft.plan is None
    told = capsys.readouterr().out
    assert "a batch of 2 micro-batches gives no scores for plans of 3" in told
    assert "if every step has 2, attach(..., micro_batches=2)" in told
    for slot in range(SLOTS):  # as a loss scale that is too high
        images, labels = random_batch(slot)
        (F.cross_entropy(loop.model(images), labels) * (torch.inf if slot else 1.0)).backward()
    loop.optimizer.zero_grad()
    loop.step(1)  # begins where the optimiser's step was left out, and gives the scores
    assert loop.d2ft.plan is not None
    twin = Loop(planner="joint")
    twin.step(0, slots=SLOTS - 1)
    twin.step(1)
    assert loop.d2ft.plan == twin.d2ft.plan


def test_a_micro_batch_that_gives_blocks_no_gradient_gives_no_scores(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As of a loss that a loop leaves out before its backward, or below a classifier that begins at zero."""
    told = "d2ft: a batch with gradients that are zero, absent or not finite gives no scores"
    loop = Loop(planner="joint", micro_batches=2)
    loop.model(random_batch(0)[0])
    loop.step(0, slots=1)
    assert told in capsys.readouterr().out
    assert loop.d2ft.plan is None
    loop.step(1, slots=2)
    assert loop.d2ft.plan is not None
    loop = Loop(planner="joint")
    nn.init.zeros_(loop.model.head.weight)
    loop.step(0)
    assert told in capsys.readouterr().out
    loop.step(1)
    assert loop.d2ft.plan is not None
    assert loop.d2ft._controller.scores.forward.any(axis=(1, 2)).all()


@pytest.mark.parametrize("settings", [{"compute_budget": 0.5, "total_steps": 8}, {"planner": "joint"}])
def test_more_passes_than_micro_batches_are_refused_at_the_first_step(settings: dict[str, Any]) -> None:
    loop = Loop(**settings)
    images, labels = random_batch(9)
    (
        F.cross_entropy(loop.model(images), labels) * torch.inf
    ).backward()  # a step that a loss scale leaves out
    loop.optimizer.zero_grad()
    for slot in range(1, SLOTS):
        loop.model(random_batch(slot)[0])  # and what is not trained on
    with pytest.raises(ConfigError, match=r"^micro_batches=3, but 4 forward passes .*, micro_batches=4\)$"):
        loop.step(0, slots=SLOTS + 1)


def test_fewer_passes_are_silent_and_more_of_them_later_are_told_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loop = Loop(compute_budget=0.5, total_steps=8)
    loop.step(0)
    loop.step(1, slots=SLOTS - 1)
    assert "micro_batches" not in capsys.readouterr().out
    for step in range(2, 6):
        loop.step(step, slots=SLOTS + 1)
        assert ("but 4 forward passes came" in capsys.readouterr().out) is (step == 3)


def test_views_that_wait_for_one_backward_are_passes_of_one_step() -> None:
    """As in contrastive learning."""
    images, labels = random_batch(0)
    for micro_batches in (2, 1):
        loop = Loop(micro_batches=micro_batches, compute_budget=0.5, total_steps=4)
        views = [loop.model(images) for _ in range(2)]
        (F.cross_entropy(views[0], labels) + F.mse_loss(*views)).backward()
        if micro_batches == 2:
            loop.optimizer.step()
            assert loop.d2ft.report().splitlines()[1].startswith("1 steps so far")
            continue
        with pytest.raises(
            ConfigError, match=r"^micro_batches=1, but 2 forward passes .*, micro_batches=2\)$"
        ):
            loop.optimizer.step()


@pytest.mark.parametrize("is_cleared", [True, False])
def test_passes_whose_gradients_never_reach_a_step_are_told_once(
    is_cleared: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the first pass of sharpness-aware minimization, or of an attack in training mode."""
    loop = Loop(micro_batches=1, compute_budget=0.5, total_steps=20)
    for step in range(8):
        images, labels = random_batch(step)
        loss = F.cross_entropy(loop.model(images), labels)
        if is_cleared:
            loss.backward()
            loop.optimizer.zero_grad()
        else:
            torch.autograd.grad(loss, list(loop.model.head.parameters()))
        F.cross_entropy(loop.model(images), labels).backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        told = "but 2 forward passes came before optimizer.step(), " in capsys.readouterr().out
        assert told is (step == 4)


@pytest.mark.parametrize("is_cleared", [True, False])
def test_micro_batches_that_an_epoch_leaves_over_make_no_step(
    is_cleared: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the next epoch begins with their gradients or clears them: images grow with the steps that are made."""
    loop = Loop(micro_batches=2, compute_budget=0.5, total_steps=6)
    sizes = []
    hook = loop.model.blocks[0].register_forward_pre_hook
    hook(lambda _, inputs: sizes[-1].append(inputs[0].shape[1]))
    sizes.append([])
    for _ in range(3):
        if is_cleared:
            loop.optimizer.zero_grad()
        for slot in range(5):
            images, labels = random_batch(slot)
            F.cross_entropy(loop.model(images), labels).backward()
            if slot % 2:
                loop.optimizer.step()
                loop.optimizer.zero_grad()
                sizes.append([])
    assert [len(each) for each in sizes] == [2, 2, 3, 2, 3, 2, 1]
    curve = loop.d2ft._plans().context.curve
    assert curve is not None
    assert [set(each) for each in sizes[:6]] == [{1 + math.prod(curve.grid_at(step))} for step in range(6)]
    assert loop.d2ft.report().splitlines()[1].startswith("6 steps so far: ")
    told = capsys.readouterr().out
    assert "micro_batches" not in told
    assert "step 7" not in told


def test_adapters_that_come_after_attach_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_vit()
    d2ft_hpc.attach(model, total_steps=4)
    get_peft_model(model, LoraConfig(r=2, target_modules=["attn.qkv"]))
    with pytest.raises(ConfigError, match="get_peft_model, or what else changes blocks, before attach"):
        model.train()(random_batch(0)[0])


def test_parameters_that_are_frozen_or_freed_after_attach_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loop = Loop(planner="joint")
    loop.model.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"^cls_token was freed after attach, .*embeddings='trained'"):
        loop.step(0)
    loop.model.blocks[0].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"^blocks \[0\] were frozen, or freed, after attach"):
        loop.step(0)

    def frozen(model: nn.Module) -> nn.Module:
        model.blocks[:2].requires_grad_(False)
        return model

    loop = Loop(wrap=frozen, planner="joint")
    for step in range(4):
        loop.step(step)
        assert ("blocks [0, 1] were frozen, or freed" in capsys.readouterr().out) is (step == 2)
        if step == 1:
            loop.model.blocks.requires_grad_(True)

    loop = Loop(compute_budget=0.5, total_steps=8)
    loop.step(0)
    loop.model.blocks[1].mlp.requires_grad_(False)
    loop.step(1)
    told = r"d2ft: parts of blocks \[1\] were frozen, or freed, .* shares of compute are not those that are told\n"
    assert re.search(told, capsys.readouterr().out)


def test_a_loop_that_goes_on_says_so_and_what_is_other_than_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun = Loop(micro_batches=1, compute_budget=0.7, total_steps=8)
    for step in range(4):
        begun.step(step, slots=1)
    resumed = Loop(micro_batches=1, compute_budget=0.5, total_steps=20)
    for name in ("model", "optimizer", "d2ft"):
        getattr(resumed, name).load_state_dict(copy.deepcopy(getattr(begun, name).state_dict()))
    capsys.readouterr()
    resumed.step(4, slots=1)
    told = capsys.readouterr().out
    assert "compute_budget=0.5 (was 0.7), total_steps=20 (was 8)\n" in told
    assert "d2ft: from step 5 on: images of 8 x 8 pixels, all heads of all blocks\n" in told
    assert "the optimizer had made" not in told
    forgotten = Loop(micro_batches=1, compute_budget=0.7, total_steps=8)
    for name in ("model", "optimizer"):
        getattr(forgotten, name).load_state_dict(getattr(begun, name).state_dict())
    for step in range(4, 6):
        forgotten.step(step, slots=1)
        told = capsys.readouterr().out
        assert ("had made 4 steps before, but plans began at step 1" in told) is (step == 4)


def test_what_is_told_as_a_loop_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[Any] = []
    monkeypatch.setattr("d2ft_hpc.user_loop.attached.atexit.register", at_exit.append)
    loop = Loop(micro_batches=1, compute_budget=0.5, total_steps=8)
    for step in range(4):
        loop.step(step, slots=1)
    (tell,) = at_exit
    told = "stopped after 4 of total_steps=8, before images had full size: go on"
    for is_saved in (False, True):
        if is_saved:
            loop.d2ft.state_dict()
        tell()
        assert (told in capsys.readouterr().out) is not is_saved
    short = Loop(micro_batches=1, compute_budget=0.3, total_steps=3)
    for step in range(3):
        short.step(step, slots=1)
    at_exit[-1]()
    told = capsys.readouterr().out
    assert "16 x 16 pixels for none" in told
    assert "from step 4" not in told
    assert "stopped after" not in told


def test_copies_and_files_of_the_model_are_plain_ones() -> None:
    loop = Loop(planner="joint")
    loop.step(0)
    average = copy.deepcopy(loop.model).train()
    saved = io.BytesIO()
    torch.save(loop.model, saved)
    read = torch.load(io.BytesIO(saved.getvalue()), weights_only=False).train()
    images, _ = random_batch(0)
    expected = average(images)  # dense: no plan, no micro-batch
    torch.testing.assert_close(read(images), expected)
    assert loop.d2ft.current_slot() == 0
    loop.step(1)


def test_a_plan_of_one_s_own() -> None:
    plan = SkipPlan(np.random.default_rng(0).integers(0, 3, (SLOTS, DEPTH, HEADS)), 1)
    loop = Loop(planner="joint")
    loop.d2ft.activate(plan)
    reference = tiny_vit()
    executor = attach(reference)
    executor.activate(plan, 0)
    expected = 0.0
    for slot in range(SLOTS):
        images, labels = random_batch(slot, samples=12)
        with executor.micro_batch(slot):
            expected += F.cross_entropy(reference.train()(images), labels).item() / SLOTS
    assert loop.step(0) == pytest.approx(expected, rel=1e-6)
    assert loop.d2ft.plan == plan
    with pytest.raises(PlanError, match="rows for 1 micro-batches a replica"):
        loop.d2ft.activate(SkipPlan.dense(1, 1, DEPTH, HEADS))


def test_bad_settings_and_states() -> None:
    with pytest.raises(ConfigError, match="compute_budgets"):
        d2ft_hpc.attach(tiny_vit(), compute_budgets=0.5)
    with pytest.raises(UnsupportedModelError, match="model is a str: give one of timm or transformers"):
        d2ft_hpc.attach("vit_tiny_patch16_224", total_steps=3)
    with pytest.raises(PlanError, match=r"nope\.h5"):
        d2ft_hpc.attach(tiny_vit(), file="nope.h5")
    with pytest.raises(ConfigError, match=r"^plan: no section here; give its keys to attach, such as"):
        d2ft_hpc.attach(tiny_vit(), plan={"planner": "joint"})
    with pytest.raises(ConfigError, match="compute_budget=6"):
        d2ft_hpc.attach(tiny_vit(), 6)
    with pytest.raises(ConfigError, match="micro_batches=0"):
        d2ft_hpc.attach(tiny_vit(), micro_batches=0)
    with pytest.raises(
        ConfigError, match=r"total_steps: planner 'tokens' lets images grow .* say how many steps"
    ):
        d2ft_hpc.attach(tiny_vit())
    with pytest.raises(
        PlanError,
        match=r"^compute_budget=0\.1: .* 2 x 2 patches throughout take; at least 0\.2.*, or smaller options\.sides$",
    ):
        d2ft_hpc.attach(tiny_vit(), 0.1, total_steps=3)
    with pytest.raises(PlanError, match=r"^compute_budget=0\.0001: .*least"):
        d2ft_hpc.attach(tiny_vit(), 1e-4, planner="joint")
    with pytest.raises(
        PlanError, match=r"^compute_budget=0\.01: scoring .* or, for images, a smaller options\.image_size"
    ):
        d2ft_hpc.attach(tiny_vit(), 0.01, planner="samples")
    with pytest.raises(ConfigError, match=r"^compute_budget=60: .* write it as a share, 0\.6 for 60 %"):
        d2ft_hpc.attach(tiny_vit(), 60, total_steps=3)
    loop = Loop(planner="joint")
    loop.model.blocks[1].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"blocks \[1\] were frozen.*before d2ft_hpc\.attach"):
        loop.step(0)
    with pytest.raises(CheckpointError, match="not what state_dict"):
        loop.d2ft.load_state_dict({"plans": 3})
    with pytest.raises(CheckpointError, match="damaged"):
        loop.d2ft.load_state_dict({"plans": "AAAA", "steps": 0, "draws": 0})


class Wrapped(nn.Module):
    """A supported model under a head of its own, of which it calls what it needs."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.own_head = backbone, nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.own_head(self.backbone.forward_features(images)[:, 0])
        return logits


@pytest.mark.parametrize("settings", [{"planner": "joint"}, {"planner": "samples", "compute_budget": 0.7}])
def test_a_model_inside_a_module_of_one_s_own(settings: dict[str, Any]) -> None:
    loop, again = (Loop(wrap=Wrapped, num_classes=0, **settings) for _ in range(2))
    again.model.load_state_dict(loop.model.state_dict())
    begun = loop.model.own_head.weight.clone()
    losses = [[each.step(step) for step in range(3)] for each in (loop, again)]
    assert losses[0] == losses[1]
    assert not torch.equal(loop.model.own_head.weight, begun)
    promised = loop.d2ft.promised_share
    assert promised == pytest.approx(settings.get("compute_budget", 0.6), abs=0.1)
    # The head beside it counts as computed, and was not promised.
    assert promised < loop.d2ft.measured_share < 1.001 * promised


def test_unbiased_weights_are_of_the_whole_module_s_classes() -> None:
    """A drawn sample's label times its weight; over all draws the weighted sum is the whole batch's."""
    settings = {"planner": "samples", "compute_budget": 0.7, "options": {"weights": "unbiased"}}
    loop = Loop(wrap=Wrapped, num_classes=0, micro_batches=1, **settings)
    images, labels = random_batch(0, samples=12)
    draws, sums = 200, torch.zeros(CLASSES)
    for _ in range(draws):
        chosen, targets = loop.d2ft.choose(images, labels)
        assert targets.shape == (len(chosen), CLASSES)
        sums += targets.sum(0) / len(chosen) * len(images) / draws
    torch.testing.assert_close(sums, torch.bincount(labels, minlength=CLASSES).float(), rtol=0, atol=0.2)
    F.cross_entropy(loop.model(chosen), targets).backward()
    loop.optimizer.step()


def test_a_module_inside_a_module_follows_the_plan_as_by_itself() -> None:
    plan = SkipPlan(np.random.default_rng(0).integers(0, 3, (SLOTS, DEPTH, HEADS)), 1)
    losses = []
    for wrap in (None, nn.Sequential):
        loop = Loop(wrap=wrap, planner="joint")
        loop.d2ft.activate(plan)
        losses.append([loop.step(step) for step in range(3)])
    assert losses[0] == losses[1]


class Distilled(nn.Module):
    """A student beside a frozen teacher, which is a supported model too and comes first."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.teacher = tiny_vit(1).requires_grad_(False).eval()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            taught = self.teacher(images)
        logits: Tensor = self.student(images) + taught
        return logits


def test_a_student_beside_its_teacher_trains_under_ddp_as_without() -> None:
    losses = []
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for wrap in (Distilled, lambda student: DistributedDataParallel(Distilled(student))):
            loop = Loop(planner="random", seed=1)
            loop.model = wrap(loop.model)
            losses.append([loop.step(step) for step in range(3)])
        del loop
    finally:
        gc.collect()
        torch.distributed.destroy_process_group()
    assert losses[0] == losses[1]


def test_a_frozen_embedding_may_be_left_in_evaluation_mode() -> None:
    losses = []
    for is_left in (False, True):
        loop = Loop(wrap=nn.Sequential, compute_budget=0.5, total_steps=4)
        loop.model[0].patch_embed.train(not is_left)
        losses.append([loop.step(step) for step in range(4)])
        assert loop.d2ft.measured_share == pytest.approx(loop.d2ft.promised_share, rel=1e-6)
    assert losses[0] == losses[1]


def test_a_model_that_a_backward_runs_again_is_no_further_micro_batch() -> None:
    losses = []
    for runs_again in (False, True):
        loop = Loop(planner="random", seed=1)
        model = loop.model
        if runs_again:
            loop.model = partial(checkpoint, model, use_reentrant=False)
        losses.append([loop.step(step) for step in range(3)])
    assert losses[0] == losses[1]


class RunsAgain(nn.Module):
    """Calls the parts of a model as loops of one's own do, its blocks by torch's reentrant checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        model: Any = self.model
        x = model._pos_embed(model.patch_embed(images))
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        logits: Tensor = model.forward_head(model.norm(x))
        return logits


@pytest.mark.parametrize("planner", ["tokens", "joint"])
def test_blocks_that_get_no_gradient_are_told(planner: str) -> None:
    """Where frozen embeddings take none, torch only warns, and no block trains."""
    loop = Loop(planner=planner, wrap=RunsAgain, **({"total_steps": 4} if planner == "tokens" else {}))
    with torch.no_grad():
        loop.model(random_batch(0)[0])  # an evaluation
    with pytest.raises(PlanError, match=r"block 0 takes no gradient .* use_reentrant=False"):
        loop.step(0)


def test_what_cannot_be_followed_is_said() -> None:
    loop = Loop(planner="joint")
    loop.model.forward(torch.zeros(2, 3, 16, 16)).sum().backward()
    loop.optimizer.step()
    with pytest.raises(
        PlanError, match=r"VisionTransformer was not called in training mode.*not its forward"
    ):
        loop.optimizer.step()
    loop = Loop(planner="joint")
    loop.model.eval()
    loop.model(torch.zeros(2, 3, 16, 16)).sum().backward()
    loop.optimizer.step()
    with pytest.raises(PlanError, match=r"not called in training mode.*call model\.train\(\) before"):
        loop.optimizer.step()
    with pytest.raises(UnsupportedModelError, match="ModuleList has 2 supported models inside"):
        d2ft_hpc.attach(nn.ModuleList([tiny_vit(), tiny_vit()]), total_steps=3)
    with pytest.raises(UnsupportedModelError, match="Linear is none of the supported models"):
        d2ft_hpc.attach(nn.Linear(2, 2), total_steps=3)


def test_a_forward_may_be_in_the_closure_of_the_optimiser_s_step() -> None:
    """As Lightning has it: the last micro-batch of each batch."""
    loop, usual = Loop(planner="joint"), Loop(planner="joint")

    def closure(loss: Tensor) -> Tensor:
        (loss / SLOTS).backward()
        return loss

    for step in range(2):
        for slot in range(SLOTS):
            images, labels = random_batch(10 * step + slot, samples=12)
            if slot < SLOTS - 1:
                closure(F.cross_entropy(loop.model(images), labels))
        last = images, labels
        loop.optimizer.step(lambda last=last: closure(F.cross_entropy(loop.model(last[0]), last[1])))
        loop.optimizer.zero_grad()
        usual.step(step)
    torch.testing.assert_close(loop.model.state_dict(), usual.model.state_dict())
    assert loop.d2ft.plan == usual.d2ft.plan
    assert loop.d2ft.measured_share == pytest.approx(loop.d2ft.promised_share, rel=1e-9)


@pytest.mark.parametrize("is_said", [True, False])
def test_an_evaluation_between_micro_batches_is_no_training(is_said: bool) -> None:
    loop = Loop(planner="random", seed=1)
    for slot in range(SLOTS):
        images, labels = random_batch(slot, samples=12)
        (F.cross_entropy(loop.model(images), labels) / SLOTS).backward()
        loop.model.train(not is_said)
        with torch.no_grad():
            loop.model(images)
        loop.model.train()
    loop.optimizer.step()
    assert loop.d2ft.measured_share == pytest.approx(loop.d2ft.promised_share, rel=1e-9)


class OfFeatures(nn.Module):
    """Calls parts of a model, as timm's distillation of features does."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.vit.forward_head(self.vit.forward_features(images))
        return features


@pytest.mark.parametrize("wrap", [None, OfFeatures])
def test_a_teacher_s_forward_is_no_training(wrap: Any) -> None:
    """Whether it comes before the student's or after it. The student's blocks skip heads by functions of autograd's,
    which compute without gradients."""
    loop, teacher = Loop(planner="random", seed=1, wrap=wrap), tiny_vit(1)
    for slot in range(SLOTS):
        images, labels = random_batch(slot, samples=12)
        with torch.no_grad():
            before = teacher(images)
        logits = loop.model(images)
        with torch.no_grad():
            after = teacher(images)
        (F.cross_entropy(logits, labels) + F.mse_loss(logits, before + after)).backward()
    loop.optimizer.step()
    assert loop.d2ft.measured_share == pytest.approx(loop.d2ft.promised_share, rel=1e-9)


@pytest.mark.skipif(
    not hasattr(torch._C, "_dynamo_save_local_dispatch_key_set"),
    reason="before PyTorch 2.14 nothing keeps a mode that began in a compiled call",
)
def test_a_backward_after_a_compiled_forward_is_measured_too() -> None:
    """Of a whole model that the loop itself compiles, as a Trainer does by `torch_compile`."""
    loop = Loop(planner="random", seed=1)
    compiled = torch.compile(loop.model, backend="eager")
    for slot in range(SLOTS):
        compiled(random_batch(slot, samples=12)[0]).square().mean().backward()
    loop.optimizer.step()
    assert loop.d2ft.measured_share == pytest.approx(loop.d2ft.promised_share, rel=1e-9)
    assert not is_counting()


def test_a_batch_without_a_backward_says_nothing_of_the_next_ones_compute() -> None:
    """As of a loop that goes on with the next batch where a loss is not finite, before any backward."""
    loop, usual = (Loop(compute_budget=0.5, total_steps=12, micro_batches=1) for _ in range(2))
    loop.model(random_batch(0, samples=12)[0])
    for step in range(2):
        loop.step(step, slots=1)
        usual.step(step, slots=1)
    assert loop.d2ft.measured_share == pytest.approx(loop.d2ft.promised_share, rel=1e-9)
    with_it, without = loop.d2ft._counter.so_far, usual.d2ft._counter.so_far
    executed, planned = (
        getattr(with_it, key) - getattr(without, key) for key in ("executed_flops", "planned_flops")
    )
    assert 0 < executed < 0.4 * planned  # a forward alone


@pytest.mark.parametrize("always", [False, True])
def test_a_batch_that_lacks_a_backward_is_no_measure_of_others(always: bool) -> None:
    """As of a loop that leaves out a loss that is not finite; one that always does so is measured as it is."""
    loop = Loop(planner="random", seed=1)
    for step in range(3):
        for slot in range(SLOTS):
            images, labels = random_batch(10 * step + slot, samples=12)
            loss = F.cross_entropy(loop.model(images), labels)
            assert is_counting() is (step < 2)
            if slot or not (always or step == 0):
                loss.backward()
        loop.optimizer.step()
        assert (loop.d2ft.measured_share is None) is (step == 0)
    if always:
        assert loop.d2ft.measured_share < 0.9 * loop.d2ft.promised_share
    else:
        assert loop.d2ft.measured_share == pytest.approx(loop.d2ft.promised_share, rel=1e-9)


class OutOfMemory(torch.autograd.Function):
    """Raises in the forward or in the backward, as often as it is told to."""

    left = 0
    place = ""

    @classmethod
    def raise_in(cls, place: str, times: int = 1) -> None:
        cls.place, cls.left = place, times

    @classmethod
    def _run(cls, place: str) -> None:
        if cls.left and cls.place == place:
            cls.left -= 1
            raise torch.OutOfMemoryError(place)

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        OutOfMemory._run("forward")
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        OutOfMemory._run("backward")
        return gradient


def runs_out_of_memory(loop: Loop) -> Loop:
    loop.model.blocks[-1].register_forward_hook(lambda _, inputs, output: OutOfMemory.apply(output))
    return loop


def try_step(loop: Loop, step: int, *, samples: int, slots: int) -> None:
    for slot in range(slots):
        images, labels = random_batch(10 * step + slot, samples=samples)
        loss = F.cross_entropy(loop.model(images), labels)
        loop.d2ft.record.loss(loss)
        (loss / slots).backward()
    loop.optimizer.step()
    loop.optimizer.zero_grad()


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("settings", [{"planner": "joint"}, {"compute_budget": 0.5, "total_steps": 6}])
def test_a_batch_that_ran_out_of_memory_and_is_run_again_counts_once(
    place: str,
    micro_batches: int,
    settings: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Against a loop that took the smaller batches from the beginning."""
    told, states, losses = [], [], []
    for name in ("usual", "again"):
        loop = Loop(micro_batches=micro_batches, results=str(tmp_path / name), **settings)
        runs_out_of_memory(loop)
        for step in range(6):
            fails = step in (0, 2, 3)
            if name == "again" and fails:
                OutOfMemory.raise_in(place)
                with pytest.raises(torch.OutOfMemoryError):
                    try_step(loop, step, samples=12, slots=micro_batches)
                loop.optimizer.zero_grad()
            try_step(loop, step, samples=6 if fails else 12, slots=micro_batches)
        loop.d2ft.record.close()
        planned = re.sub(r"made in \S+ s", "", capfd.readouterr().out)
        told.append(planned + loop.d2ft.report())
        states.append(loop.model.state_dict())
        with results.open(tmp_path / name) as run:
            losses.append(run.table("steps")["loss"])
    assert told[0] == told[1]
    assert "\n6 steps so far: promised" in told[0]
    assert losses[0].tolist() == losses[1].tolist()
    for name, weight in states[0].items():
        assert torch.equal(weight, states[1][name]), name


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_micro_batch_that_ran_out_of_memory_may_be_run_again_by_itself(
    place: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """What other micro-batches gave the gradients stays. A batch that computed more is no measure of others."""
    loop = runs_out_of_memory(Loop(micro_batches=2, compute_budget=0.5, total_steps=12))
    shares = []
    for step in range(3):
        for slot in range(2):
            images, labels = random_batch(slot, samples=12)
            OutOfMemory.raise_in(place, times=slot if step == 0 else 0)
            try:
                F.cross_entropy(loop.model(images), labels).backward()
            except torch.OutOfMemoryError:
                F.cross_entropy(loop.model(images[:6]), labels[:6]).backward()
            assert loop.d2ft.current_slot() == slot
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        shares.append(loop.d2ft.measured_share)
    assert shares[0] is None
    assert shares[1] == pytest.approx(loop.d2ft.promised_share, rel=1e-9)
    assert loop.d2ft.report().splitlines()[1].startswith("3 steps so far: ")
    assert "miscounted" not in capfd.readouterr().out


def test_samples_are_chosen_again_where_memory_ran_out() -> None:
    loop, usual = (Loop(planner="samples", compute_budget=0.7, micro_batches=1) for _ in range(2))
    runs_out_of_memory(loop)
    OutOfMemory.raise_in("forward")
    with pytest.raises(torch.OutOfMemoryError):
        loop.d2ft.choose(*random_batch(0, samples=12))
    for step in range(2):
        assert loop.step(step, slots=1) == usual.step(step, slots=1)
    assert loop.d2ft.measured_share == usual.d2ft.measured_share
    assert loop.d2ft._counter.so_far.dense_flops == usual.d2ft._counter.so_far.dense_flops


def test_steps_that_a_loss_scale_leaves_out_now_and_then_are_no_accumulation(
    capfd: pytest.CaptureFixture[str],
) -> None:
    for micro_batches in (1, 2):
        loop = Loop(micro_batches=micro_batches, compute_budget=0.5, total_steps=7)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(7):  # every second one is left out
            for slot in range(micro_batches):
                images, labels = random_batch(10 * step + slot)
                loss = F.cross_entropy(loop.model(images), labels) * (torch.inf if step % 2 else 1.0)
                scaler.scale(loss).backward()
            scaler.step(loop.optimizer)
            scaler.update()
            loop.optimizer.zero_grad()
        assert scaler.get_scale() == 4.0 / 2**3
        assert "miscounted" not in capfd.readouterr().out


def test_batches_of_an_optimiser_that_is_none_of_torch_s_are_counted_once() -> None:
    loop = Loop(compute_budget=0.5, total_steps=12, micro_batches=1)
    for step in range(2):
        F.cross_entropy(loop.model(random_batch(step)[0]), random_batch(step)[1]).backward()
    assert not is_counting()
    assert loop.d2ft.measured_share == pytest.approx(loop.d2ft.promised_share, rel=1e-9)


@pytest.mark.parametrize("wrap", [None, lambda vit: nn.Sequential(vit, nn.Identity())])
@pytest.mark.parametrize(
    "settings",
    [
        {"compute_budget": 0.4, "total_steps": 8},
        pytest.param({"compute_budget": 0.4, "total_steps": 8, "compile": True}, marks=pytest.mark.full),
        {"planner": "random"},
    ],
)
def test_without_gradients_the_whole_model_runs_in_training_mode_too(
    settings: dict[str, Any], wrap: Any
) -> None:
    """A model without dropout is often evaluated without `model.eval()`."""
    loop = Loop(wrap=wrap, **settings)
    if "planner" in settings:
        loop.d2ft.activate(SkipPlan(np.zeros((SLOTS, DEPTH, HEADS), np.uint8), replicas=1))
    for step in range(2):
        loop.step(step)
    images, _ = random_batch(5, samples=12)
    with torch.no_grad():
        logits = loop.model(images)
        torch.testing.assert_close(logits, copy.deepcopy(loop.model)(images))
    assert not torch.allclose(logits, loop.model(images), atol=1e-3)


def test_samples_are_scored_by_what_libraries_made_of_the_model() -> None:
    """As Accelerate does for mixed precision: another forward, which is bound to the model; some modules stay as in
    evaluation."""
    loop = Loop(planner="samples", compute_budget=0.7)
    plain, seen = loop.model.forward, []

    def forward(images: Tensor) -> Tensor:
        seen.append((loop.model.training, images.shape[-1]))
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = plain(images)
        return logits.float()

    loop.model.forward = forward
    loop.model.norm.eval()
    loop.step(0)
    assert seen == [(False, 8), (True, 16)] * SLOTS
    assert loop.model.training
    assert not loop.model.norm.training


@pytest.mark.parametrize(
    "settings",
    [
        {"planner": "tokens"},
        pytest.param({"planner": "joint", "token_budget": 0.7}, marks=pytest.mark.full),
        pytest.param({"wrap": Wrapped, "num_classes": 0}, marks=pytest.mark.full),
    ],
)
def test_images_grow_through_the_training_which_goes_on_from_its_midst(settings: dict[str, Any]) -> None:
    steps = 8
    settings = {"compute_budget": 0.5, "total_steps": steps, **settings}
    whole, first, resumed = Loop(**settings), Loop(**settings), Loop(weights=1, **settings)
    losses, shares, grids = [], [], []
    for step in range(steps):
        losses.append(whole.step(step))
        if whole.d2ft.measured_share is not None:
            assert whole.d2ft.measured_share == pytest.approx(whole.d2ft.promised_share, rel=1e-3)
        if step < 5:
            assert first.step(step) == losses[-1]
        shares.append(whole.d2ft.promised_share)  # of the step that comes
        plan = whole.d2ft.plan
        grids += [] if plan is None else [plan.grid_of(0)]
    assert grids == sorted(grids)
    assert {(2, 2), (4, 4)} <= {*grids}
    planned = [share for share in shares if share is not None]
    assert planned == sorted(planned)
    curve = whole.d2ft._controller.context.curve
    assert curve.share == pytest.approx(settings.get("token_budget", 0.5), abs=0.1)
    assert curve.share <= settings.get("token_budget", 0.5)
    for name in ("model", "optimizer", "d2ft"):
        getattr(resumed, name).load_state_dict(getattr(first, name).state_dict())
    assert [resumed.step(step) for step in range(5, steps)] == losses[5:]


def test_images_that_a_plan_could_only_shrink_unasked_are_refused_before_the_first_step() -> None:
    model = tiny_vit(dynamic_img_size=True).train()
    d2ft_hpc.attach(model, total_steps=8)
    with pytest.raises(PlanError, match=r"made for images of 16 x 16 pixels and gets 24 x 24.*img_size="):
        model(torch.zeros(2, 3, 24, 24))


class OfOneSize(VisionTransformer):
    """As that of masked autoencoders' authors, of whose kind many were written."""

    def forward_features(self, images: Tensor, **kwargs: Any) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        return self.norm(self.blocks(x))


def test_a_forward_for_one_image_size_is_refused_in_one_line_by_plans_that_scale_images() -> None:
    def model() -> OfOneSize:
        return OfOneSize(
            img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=HEADS, num_classes=CLASSES
        )

    with pytest.raises(
        UnsupportedModelError, match=r"^OfOneSize takes .* 16 x 16 .* fails on \d+ x .*joint$"
    ):
        d2ft_hpc.attach(model(), total_steps=8)
    d2ft_hpc.attach(model(), planner="joint")


def test_a_training_that_goes_on_beyond_its_steps_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    loop = Loop(compute_budget=0.5, total_steps=2)
    for step in range(4):
        loop.step(step)
    assert capfd.readouterr().out.count("total_steps=2, but step 3 came: images have full size") == 1


def test_a_gpu_without_graphs_is_told_of_them(capfd: pytest.CaptureFixture[str]) -> None:
    for settings, is_told in (({}, True), ({"cuda_graphs": True}, False), ({"planner": "joint"}, False)):
        loop = d2ft_hpc.attach(tiny_vit(), total_steps=4, **settings)
        plans = loop._plans()
        assert "cuda_graphs" not in capfd.readouterr().out  # on a CPU
        tell_of_graphs(plans, torch.device("cuda"))
        assert ("cuda_graphs=True" in capfd.readouterr().out) is is_told, settings


def test_a_loop_s_report_has_the_compute_of_all_its_steps_before_its_resumption_too(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Against the costs of each step's images; the last batch is small, as at the end of an epoch."""
    sizes, steps = [12, 12, 12, 5], 4

    def train(loop: Loop, *of: int) -> None:
        for step in of:
            images, labels = random_batch(step, samples=sizes[step])
            F.cross_entropy(loop.model(images), labels).backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()

    loop, resumed = (Loop(micro_batches=1, compute_budget=0.6, total_steps=steps) for _ in range(2))
    train(loop, 0, 1)
    for name in ("model", "optimizer", "d2ft"):
        getattr(resumed, name).load_state_dict(getattr(loop, name).state_dict())
    train(resumed, 2, 3)
    context = resumed.d2ft._controller.context
    curve, costs = context.curve, context.costs
    flops = np.array([costs.at[curve.grid_at(step)].dense_flops for step in range(steps)])
    share = flops @ sizes / costs.dense_flops / sum(sizes)
    assert curve.share == pytest.approx(flops.mean() / costs.dense_flops)
    assert share != pytest.approx(curve.share, abs=0.01)
    now, so_far = resumed.d2ft.report().splitlines()
    assert now.startswith("images of 16 x 16 pixels, all heads of all blocks: promised 100.0%")
    assert so_far == (
        f"4 steps so far: promised {share:.1%} of the dense compute, measured {share:.1%}; {curve.share:.1%} in all 4, "
        f"if they have equally many samples"
    )
    told = capfd.readouterr().out
    assert "from step 1 on: images of 8 x 8 pixels, all heads of all blocks, " in told
    assert "begins" not in told


@pytest.mark.parametrize("planner", ["random", "tokens"])
@pytest.mark.parametrize("recomputed", ["nothing", "blocks", "model"])
def test_recomputed_activations_count_as_measured_alone_and_are_told(planner: str, recomputed: str) -> None:
    loop = Loop(planner=planner, seed=1, total_steps=2)
    if recomputed == "blocks":
        loop.model.set_grad_checkpointing()
    elif recomputed == "model":
        loop.model = partial(checkpoint, loop.model, use_reentrant=False)
    for step in range(2):
        loop.step(step)
    for line in loop.d2ft.report().splitlines():
        told = re.search(r"promised (\S+)% of .* measured (\S+)%( with recomputed activations)?(;|$)", line)
        assert told, line
        promised, measured = float(told[1]), float(told[2])
        if recomputed == "nothing":
            assert (measured, told[3]) == (promised, None)
        else:
            assert 1.2 * promised < measured < 1.7 * promised
            assert told[3]


@pytest.mark.parametrize("planner", ["tokens", "joint"])
def test_an_optimiser_made_before_attach_trains_the_same(planner: str) -> None:
    """Also one that has stepped what attach freezes, and whose gradients are kept as zeros, which decay weights."""
    losses, embeddings = [], []
    for attach_first, warm in ((True, False), (False, False), (False, True)):
        model = tiny_vit().train()
        settings = {"planner": planner, "total_steps": 3}
        d2ft = d2ft_hpc.attach(model, **settings) if attach_first else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
        if warm:
            weights = copy.deepcopy(model.state_dict())
            F.cross_entropy(model(random_batch(9)[0]), random_batch(9)[1]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            model.load_state_dict(weights)
        d2ft = d2ft or d2ft_hpc.attach(model, **settings)
        begun = model.pos_embed.detach().clone()
        losses.append([])
        for step in range(3):
            images, labels = random_batch(step, samples=12)
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            losses[-1].append(loss.item())
        embeddings.append(torch.equal(model.pos_embed, begun))
    assert losses[0] == losses[1]
    assert all(embeddings)


def test_a_loop_may_end_while_the_optimiser_of_another_steps() -> None:
    loop, other = Loop(planner="random"), Loop(planner="random")
    freed = weakref.ref(other.d2ft)
    handle = register_optimizer_step_post_hook(lambda *_: gc.collect())
    Loop(planner="random")  # its hooks come after
    del other
    assert freed() is not None
    loop.step(0)
    handle.remove()
    assert freed() is None
    assert loop.d2ft._steps == 1


def test_optimisers_that_step_while_the_backward_runs_are_refused() -> None:
    """As in torch's tutorial, one for each parameter, so that gradients take no memory. Scores of a batch would lack
    the blocks below the first one that steps."""
    loop = Loop(planner="joint", micro_batches=1)
    for parameter in loop.model.parameters():
        if parameter.requires_grad:
            own = torch.optim.SGD([parameter], lr=1e-3)
            parameter.register_post_accumulate_grad_hook(lambda _, own=own: own.step())
    with pytest.raises(PlanError, match=r"while the backward pass still runs .* step after loss\.backward"):
        loop.step(0, slots=1)


def test_an_optimiser_of_other_parameters_is_refused() -> None:
    model = tiny_vit()
    d2ft_hpc.attach(model, planner="joint")
    optimizer = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    model.train()
    for step in range(2):
        images, labels = random_batch(step)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    with pytest.raises(PlanError, match="holds none of the parameters of VisionTransformer, which does not"):
        model(images)


@pytest.mark.parametrize("wrap", [None, lambda vit: nn.Sequential(vit, nn.Identity())])
def test_data_parallel_is_refused(wrap: Any) -> None:
    """Replicas as `torch.nn.DataParallel` makes them on several GPUs: their blocks would run on the first one."""
    model = Loop(wrap=wrap, total_steps=4).model
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        replica._modules.update({name: replicas[child] for name, child in module.named_children()})
        vars(replica).update(module._parameters)
    with pytest.raises(ConfigError, match=r"runs in torch\.nn\.DataParallel.*by torchrun"):
        replicas[model](random_batch(0)[0])


def test_fsdp2_before_attach_is_refused() -> None:
    model = tiny_vit()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model.blocks[0])
        with pytest.raises(ConfigError, match="call attach first, then fully_shard"):
            d2ft_hpc.attach(model, total_steps=3)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("is_dead", [True, False])
def test_a_classifier_that_is_zero_and_frozen_is_told(
    is_dead: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_vit(0)
    model.head.requires_grad_(not is_dead)
    torch.nn.init.zeros_(model.head.weight)
    d2ft_hpc.attach(model, 0.6, planner="static")
    model(random_batch(0, 4)[0]).sum().backward()
    assert ("head is zero and frozen" in capsys.readouterr().out) == is_dead


def test_samples_are_counted_by_images_or_text_whatever_stands_before_them() -> None:
    images, labels, scalar = torch.zeros(5, 3, 8, 8), torch.zeros(5), torch.tensor(1.0)
    ids, mask = torch.zeros(4, 7, dtype=torch.long), torch.ones(1, 1, 7, 7)
    for inputs, samples in (
        ([scalar, labels, images, {}], images),
        ([{"labels": labels, "pixel_values": images}], images),
        ([{"attention_mask": mask, "labels": ids, "input_ids": ids + 1}], ids + 1),
        ([{"patch_coord": torch.zeros(5, 9, 2), "patches": torch.zeros(5, 9, 12)}], torch.zeros(5, 9, 12)),
        ([(labels,)], labels),
    ):
        assert torch.equal(samples_in(inputs), samples)
    with pytest.raises(PlanError, match="without a tensor"):
        samples_in([scalar, {"text": "none"}])


def test_a_plan_of_images_whose_costs_nobody_counted_is_refused_before_a_step() -> None:
    loop = Loop(planner="joint", compute_budget=1.0)
    with pytest.raises(PlanError, match="2 x 2 patches, whose costs were not counted"):
        loop.d2ft.activate(SkipPlan.dense(SLOTS, 1, DEPTH, HEADS).at((2, 2)))
    loop.step(0)
    grown = Loop(compute_budget=0.5, total_steps=4)
    grown.step(0)
    with pytest.raises(
        CheckpointError, match=r"the saved state is of planner 'tokens', this training has 'joint'"
    ):
        loop.d2ft.load_state_dict(grown.d2ft.state_dict())
    loop.step(1)


def test_images_grow_as_the_loop_says_under_any_plan_that_it_is_given() -> None:
    """A plan of one's own, and one of a loop that had other sizes."""
    sizes = {"options": {"sides": [0.25, 0.75]}, "compute_budget": 0.5, "total_steps": 4}
    begun, grids = Loop(compute_budget=0.5, total_steps=4), []
    begun.step(0)
    for starts in range(2):
        loop, seen = Loop(**sizes), []
        loop.model.blocks[0].register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0].shape[1])
        )
        if starts:
            loop.d2ft.load_state_dict(begun.d2ft.state_dict())
        else:
            loop.d2ft.activate(SkipPlan.dense(SLOTS, 1, DEPTH, HEADS))
        for step in range(starts, 4):
            loop.step(step)
        grids.append([round((tokens - 1) ** 0.5) for tokens in seen[::SLOTS]])
    curve = loop.d2ft._controller.context.curve
    assert grids[0] == [curve.grid_at(step)[0] for step in range(4)]
    assert grids[1] == grids[0][1:]
    assert {*grids[0]} >= {1, 3}


def test_a_loop_that_an_error_ended_counts_nothing_more() -> None:
    loop = Loop(planner="joint")
    images, labels = random_batch(0)
    F.cross_entropy(loop.model(images), labels)  # and what comes next fails
    assert is_counting()
    again = Loop(planner="joint")
    assert not is_counting()
    for step in range(2):
        again.step(step)
    assert again.d2ft.measured_share == pytest.approx(again.d2ft.promised_share, rel=1e-9)
    assert not is_counting()


def is_counting() -> bool:
    return _get_current_dispatch_mode() is not None


def test_two_models_in_one_loop_are_measured_apart_or_not_at_all() -> None:
    loops = [Loop(weights, compute_budget=0.5, total_steps=4, micro_batches=1) for weights in range(2)]
    images, labels = random_batch(0, samples=12)

    def step(groups: list[list[Loop]]) -> None:
        for group in groups:
            logits = [loop.model(images) for loop in group]
            (F.cross_entropy(logits[0], labels) + F.mse_loss(logits[0], logits[-1])).backward()
            for loop in group:
                loop.optimizer.step()
                loop.optimizer.zero_grad()

    step([loops])  # as in mutual learning
    assert [loop.d2ft.measured_share for loop in loops] == [None, None]
    step([[loop] for loop in loops])
    for loop in loops:
        assert loop.d2ft.measured_share == pytest.approx(loop.d2ft.promised_share, rel=1e-6)


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(12),  # of a regression
        torch.zeros(12, CLASSES, dtype=torch.long),  # one of several tasks, or of several classes
        torch.zeros(11, dtype=torch.long),
        (torch.zeros(12, dtype=torch.long), torch.zeros(12, dtype=torch.long)),
    ],
)
def test_samples_are_drawn_by_classes_alone(labels: Any) -> None:
    loop = Loop(planner="samples", compute_budget=0.7)
    with pytest.raises(
        PlanError, match=r"scores images by their classes, int64 \[12\], .*; labels are .*'tokens'"
    ):
        loop.d2ft.choose(random_batch(0, samples=12)[0], labels)


def test_only_planner_samples_draws_in_any_kind_of_loop() -> None:
    """Before the plan of the batch is asked for, which ranks would make together."""
    with pytest.raises(PlanError, match=r"for planner 'samples'; with 'joint' train on all of them"):
        choose_from([], PlanConfig(planner="joint"), Loop(planner="joint").d2ft._counter, pytest.fail)


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp1"])
def test_engines_of_others_are_refused(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Accelerate, Lightning and Trainer put around an attached model where they are told so."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_vit()
        d2ft_hpc.attach(model, planner="joint")
        if engine == "fsdp1":
            trained: Any = FullyShardedDataParallel(
                model, device_id=torch.device("cpu"), use_orig_params=True
            )
        else:
            monkeypatch.setenv("LOCAL_RANK", "0")
            config = {"train_batch_size": 6, "zero_optimization": {"stage": 0}}
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            trained = import_deepspeed().initialize(model=model, optimizer=optimizer, config=config)[0]
        told = {
            "deepspeed": "DeepSpeed's engine, .*d2ft_hpc.initialize",
            "fsdp1": r"use fully_shard \(FSDP2\)",
        }
        with pytest.raises(ConfigError, match=told[engine]):
            trained(random_batch(0)[0])
    finally:
        torch.distributed.destroy_process_group()
