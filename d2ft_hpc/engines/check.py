"""The check of a plan against the engine that is to run it, before its first step."""

from __future__ import annotations

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning import SkipPlan


def check_plan(plan: SkipPlan, *, slots: int, replicas: int) -> None:
    """Raises PlanError with reason and fix where the engine would hang, or train something else than the plan says.

    slots: micro-batches of one replica in a batch; replicas: those that the engine has.
    """
    if plan.binding == "slot" and plan.slots != slots:
        raise PlanError(
            f"the plan has rows for {plan.slots} micro-batches a replica, the engine accumulates {slots} into a step: "
            f"solve a plan for {slots} (data.slots, or gradient_accumulation_steps in DeepSpeed's JSON)"
        )
    if plan.replicas != replicas:
        raise PlanError(
            f"the plan is for {plan.replicas} replicas, the engine has {replicas}: solve a plan for {replicas}, or "
            f"start as many data-parallel ranks as the plan has replicas"
        )
