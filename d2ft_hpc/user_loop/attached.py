"""A model of the user's own that is made ready for plans, what these depend on, and what its user is told."""

from __future__ import annotations

import atexit
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.lifecycle import PlanContext, PlanController, PlanCosts, PlanState
from d2ft_hpc.lifecycle.foresight import curve_of
from d2ft_hpc.lifecycle.observed_scores import ObservedScores
from d2ft_hpc.metering import StepCosts, measure_costs
from d2ft_hpc.parallel.rank_layout import Placement
from d2ft_hpc.planning.plan import Grid
from d2ft_hpc.planning.token_curve import TokenCurve
from d2ft_hpc.user_loop.section import D2ftSection
from d2ft_hpc.user_loop.settings_kept import differences


def attached(
    model: nn.Module, whole: nn.Module, section: D2ftSection
) -> tuple[PlanExecutor, tuple[int, ...], StepCosts]:
    """The executor that the section asks for, the shape of a sample, (channel, height, width) or (token,), and what it
    costs.

    Before anything spreads the weights. whole: the user's own model, which is or has the supported one. Raises
    UnsupportedModelError where the model cannot be cut by head, ConfigError where it does not say for which images it
    was made.
    """
    executor = attach(
        model, embeddings=section.embeddings, compile=section.compile, cuda_graphs=section.cuda_graphs
    )
    shape = executor.subnets.family.sample_shape(model)
    if shape is None:
        raise ConfigError("the model has no image size: make it with img_size=, so that costs can be counted")
    costs = measure_costs(model, executor, shape, section.sides, whole=whole)
    if section.sides is not None:
        _, height, width = shape
        executor.images.size = height, width
    return executor, shape, costs


def loop_context(
    section: D2ftSection,
    costs: StepCosts,
    placement: Placement,
    *,
    slots: int,
    micro_batch_size: int,
    replicas_meet: bool,
    where: str,
) -> PlanContext:
    """What the plans of a loop depend on. costs: of the whole model. The others are the `PlanContext`'s. Raises
    ConfigError as `PlanCosts.counted` and `curve_of`."""
    return PlanContext(
        section,
        placement,
        costs,
        PlanCosts.counted(costs, section.device_speed, placement.layout.world_size),
        slots=slots,
        micro_batch_size=micro_batch_size,
        seed=section.seed,
        replicas_meet=replicas_meet,
        total_steps=section.total_steps,
        curve=curve_of(section, costs, [1] * (section.total_steps or 0), where),
        where=where,
    )


def resume(plans: PlanController, state: PlanState, step: int) -> None:
    """Goes on from `state` with batch `step`, counted from 0, at whose resolution its plan is put in force; all ranks
    call it together. Raises PlanError, before anything changes, where the plan cannot be run."""
    context, plan = plans.context, state.plan
    plan = None if plan is None else context.scaled(plan, step)
    plans.restore(replace(state, plan=plan))
    assert isinstance(context.settings, D2ftSection)
    if told := differences(state.settings, context.settings):
        plans.listener.say(told)
    if plan is not None:
        size = plans.engine.executor.images.patch_size
        plans.listener.say(f"from step {step + 1} on: {plan.in_words(size)}")


def observe_again_if_incomplete(
    plans: PlanController, source: ObservedScores, micro_batches: int, fix: str
) -> None:
    """As a batch of so many is done: if it lacked some, scores are those of the next one. fix: what to do if all
    batches have so many."""
    slots = plans.context.slots
    if source.is_observing and micro_batches < slots:
        plans.listener.say(
            f"a batch of {micro_batches} micro-batch{'es' * (micro_batches > 1)} gives no scores for plans of {slots}: "
            f"the next one runs dense, too; if every step has {micro_batches}, {fix}"
        )
        source.stop()
        source.measure()
        plans.batches = 0


def tell_if_resumed_without_plan(plans: PlanController, optimizer: Optimizer, model: nn.Module) -> None:
    """As the optimiser is about to have made the first step of a loop without a saved state: it has made others."""
    states = (optimizer.state.get(each, {}) for each in model.parameters())
    made = max((int(state["step"]) for state in states if "step" in state), default=1) - 1
    if made > 0:
        plans.listener.say(
            f"the optimizer had made {made} step{'s' if made > 1 else ''} before, but plans began at step 1: if the "
            f"training goes on, call d2ft.load_state_dict with what d2ft.state_dict() gave"
        )


def tell_if_too_short(plans: PlanController, position: Callable[[], tuple[int, int]]) -> None:
    """Says at the process's end if training ended before images had full size, and no state was saved to go on from.

    position: a method of the plans' owner: the steps done, and those that the last state that was saved or loaded had.
    """
    kept, position_of = weakref.ref(plans), weakref.WeakMethod(position)

    def tell() -> None:
        plans, position = kept(), position_of()
        failed = getattr(sys, "last_value", None) is not None
        if failed or plans is None or position is None or plans.context.curve is None:
            return
        steps, saved_steps = position()
        if steps > saved_steps and is_on_the_way(plans.context.curve.grid_at(steps - 1), plans.context.curve):
            plans.listener.say(
                f"stopped after {steps} of total_steps={plans.context.total_steps}, before images had full size: go "
                f"on from a saved state, or lower total_steps"
            )

    atexit.register(tell)


def tell_of_graphs(plans: PlanController, device: torch.device) -> None:
    """Says what makes steps shorter where blocks train on `device` without CUDA graphs, which they could have."""
    executor, context = plans.engine.executor, plans.context
    could = context.settings.entry.makes_few_shapes and not context.placement.layout.is_cut
    if device.type == "cuda" and could and not executor.makes_graphs:
        plans.listener.say(
            "on a GPU steps on few tokens wait for Python: cuda_graphs=True starts blocks at once, and compile=True "
            "makes faster kernels"
        )


def tell_of_dead_classifier(plans: PlanController, whole: nn.Module) -> None:
    """Says that nothing learns below a linear layer that is zero and frozen, as peft leaves a new classifier."""
    in_blocks = {module for block in plans.engine.executor.blocks.values() for module in block.modules()}
    for name, module in whole.named_modules():
        if not isinstance(module, nn.Linear) or module in in_blocks:
            continue
        weight = module.weight
        is_whole = not isinstance(weight, DTensor) and weight.numel() > 0 and not weight.is_meta
        if is_whole and not weight.requires_grad and not weight.any():
            plans.listener.say(
                f"{name} is zero and frozen, so that no gradient comes through it: let it train (peft: "
                f"modules_to_save)"
            )


def tell_if_too_long(plans: PlanController, step: int) -> None:
    """As a batch ends: its `total_steps` were too few. It is too early to say so as the batch begins: a loop may end
    with micro-batches that make no step. step: of the batch, counted from 0."""
    if plans.context.curve is not None and step == plans.context.total_steps:
        plans.listener.say(
            f"total_steps={step}, but step {step + 1} came: images have full size from here on, and the training "
            f"spends more than its budget; give the number of all steps"
        )


def is_on_the_way(grid: Grid, curve: TokenCurve) -> bool:
    """Whether images of this size are neither full nor those of the curve's last step."""
    return grid not in (curve.grid_at(sum(curve.steps) - 1), curve.grids[-1])
