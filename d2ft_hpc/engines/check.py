"""The check of a plan against the engine that is to run it, before anything runs."""

from __future__ import annotations

from d2ft_hpc.errors import PlanError
from d2ft_hpc.parallel.layout import Placement
from d2ft_hpc.planning import SkipPlan


def check_plan(plan: SkipPlan, placement: Placement, slots: int) -> None:
    """Raises PlanError where ranks would follow different plans, or run out of rows and wait for each other for ever.

    slots: micro-batches of a replica in each step.
    """
    layout = placement.layout
    if (plan.num_blocks, plan.num_heads) != placement.owner.shape:
        raise PlanError(
            f"the plan is for {plan.num_blocks} blocks x {plan.num_heads} heads, the model that is placed on the ranks "
            f"has {placement.owner.shape[0]} x {placement.owner.shape[1]}: solve a plan for this model"
        )
    if plan.replicas != layout.replicas:
        raise PlanError(
            f"the plan is for {plan.replicas} data-parallel replicas, but the ranks form {layout.replicas} ("
            f"{layout.stages} pipeline stages x {layout.tensor_ranks} tensor-parallel ranks each): solve a plan for "
            f"{layout.replicas}, or change the number of ranks"
        )
    if plan.binding == "slot" and plan.slots != slots:
        raise PlanError(
            f"the plan has rows for {plan.slots} micro-batches a replica, but a step has {slots} "
            f"(gradient accumulation): set data.slots={plan.slots}, or solve a plan for {slots}"
        )
