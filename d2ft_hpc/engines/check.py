"""The check of a plan against the engine that is to run it, before its first step."""

from __future__ import annotations

from torch import nn

from d2ft_hpc.errors import ConfigError, PlanError
from d2ft_hpc.families.table import family_of, find_backbone
from d2ft_hpc.planning import SkipPlan


def check_plan(plan: SkipPlan, *, slots: int, replicas: int, same_rows: str | None = None) -> None:
    """Raises PlanError with reason and fix where the engine would hang, or train something else than the plan says.

    slots: micro-batches of one replica in a batch; replicas: those that the engine has; same_rows: why all replicas
    must follow the same rows, None if they need not.
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
    if same_rows is not None:
        by_slot = plan.operations.reshape(plan.slots, plan.replicas, -1)
        differing = (by_slot != by_slot[:, :1]).any(axis=(1, 2))
        if differing.any():
            raise PlanError(
                f"the replicas' rows differ in micro-batch {int(differing.argmax())}, but {same_rows}. Solve a plan "
                f"for one replica that all follow, or change the engine"
            )


def check_recompute(model: nn.Module) -> None:
    """Raises ConfigError where activation checkpointing would lose gradients.

    Reentrant checkpointing gives no gradient to a block whose input takes none, such as the first one above frozen
    embeddings, and torch only warns.
    """
    backbone = find_backbone(model)
    if backbone is None:
        return
    family = family_of(backbone)
    if family.recomputes(backbone) and family.recomputes_reentrantly(backbone):
        raise ConfigError(
            f"activation checkpointing is reentrant, which loses the gradients of a block above frozen embeddings: "
            f"{family.not_reentrant}"
        )
