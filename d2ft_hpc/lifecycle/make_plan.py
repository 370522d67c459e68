"""Makes the plan that a run's settings ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from d2ft_hpc.errors import PlanError
from d2ft_hpc.lifecycle.context import PlanContext
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.planning import (
    BUDGET_EPSILON,
    Budgets,
    Devices,
    Operation,
    PlanProblem,
    SkipPlan,
    plan_samples,
    pose,
    solve,
)
from d2ft_hpc.planning.arrays import Flags
from d2ft_hpc.planning.communication_volume import TokenLayout
from d2ft_hpc.scores import Scores


def reads_scores(settings: PlanConfig) -> bool:
    """Whether scores are to be measured before a plan can be made."""
    return settings.entry.reads_scores and settings.file is None


def make_plan(context: PlanContext, scores: Scores | None, index: int) -> SkipPlan:
    """The plan that the settings ask for, on this rank alone; all others get it from rank 0.

    scores: None where `reads_scores` says so. index: how many plans were made before; planners with random draws draw
    anew for each.

    Raises PlanError where no plan keeps the budgets, also because frozen blocks leave nothing to plan, or where a saved
    plan is of another shape.
    """
    settings, replicas, budget = context.settings, context.replicas, context.compute_budget
    if settings.file is not None:
        return _saved_plan(Path(settings.file), context)
    if settings.entry.binding == "sample":
        return plan_samples(
            samples=context.slots * context.micro_batch_size,
            slots=context.slots,
            replicas=replicas,
            num_blocks=context.subnets[0],
            num_heads=context.subnets[1],
            compute_budget=budget,
            score_cost=context.costs.score_flops / context.costs.dense_flops,
        )
    if not settings.entry.keeps_budgets:
        dense = SkipPlan.dense(context.slots, replicas, *context.subnets)
        return replace(dense, planner=settings.planner)
    planned = context.costs.trains
    _check_frozen(planned, context)
    layouts, followed = context.token_layouts, context.followed
    problems = [
        _problem(context, scores, planned, compute_budget=budget, token_layout=layout).of_followed(followed)
        for layout in layouts
        if not (layout == "overlapped" and "sharded" in layouts)  # which sends the same
    ]
    if settings.messages == "by_head" or settings.communication_budget is None:
        problems = problems[:1]  # the layout changes nothing for the planner
    options = settings.arguments(seed=(context.seed, index))
    plans = [solve(problem, settings.planner, **options) for problem in problems]
    plan = plans[0]
    if len(plans) > 1:
        seconds = [
            context.step_time.fastest(each, problem, _that_send_no_more(problem.token_layout, layouts))[0]
            for each, problem in zip(plans, problems, strict=True)
        ]
        plan = plans[int(np.argmin(seconds))]
    of_planned = np.full((context.slots, plan.replicas, *context.subnets), Operation.FULL, dtype=np.uint8)
    of_planned[:, :, planned] = plan.operations.reshape(
        context.slots, plan.replicas, *plan.operations.shape[1:]
    )
    leader = np.unique(followed, return_inverse=True)[1].ravel()
    whole = replace(plan, operations=of_planned[:, leader].reshape(context.shape), replicas=replicas)
    if plan.replicas == replicas:
        return whole
    # What is known is how good the rows are for the mean scores of all that share them.
    status = f"{plan.status} for {plan.replicas} replicas, whose rows the others share"
    return replace(whole, status=status, objective=math.nan, bound=math.nan, gap=math.nan)


def _problem(
    context: PlanContext,
    scores: Scores | None,
    planned: Flags,
    *,
    compute_budget: float,
    token_layout: TokenLayout = "replicated",
) -> PlanProblem:
    """The problem of one batch, of all replicas.

    scores: None: all the same. planned: bool [block], blocks that the problem is about; all others, which are frozen,
    run FULL, as part of what always runs.

    Raises PlanError as `pose`.
    """
    settings, reckoned, same_rows = context.settings, context.reckoned, context.same_rows
    most_full = None if reckoned.most_full is None else context.by_device(reckoned.most_full)
    if same_rows and most_full is not None:  # rows for all are those that the one with least memory can run
        of_replicas = np.reshape(most_full, (context.replicas, -1))
        most_full = np.tile(of_replicas.min(axis=0), context.replicas).tolist()
    equal = np.ones(context.shape)
    forward, backward = (equal, equal) if scores is None else (scores.forward, scores.backward)
    return pose(
        [forward[:, planned], backward[:, planned]],
        reckoned,
        Budgets(compute_budget, settings.communication_budget, settings.memory_budget),
        Devices(
            replicas=context.replicas,
            rank=context.placement.owner[planned],
            stage=context.placement.stage[planned],
            speed=None if same_rows else context.by_device(reckoned.device_speed),
            most_full=most_full,
            replicas_meet=context.replicas_meet and not same_rows,
        ),
        messages=token_layout if settings.messages == "by_meeting" else None,
    )


def token_layout_of(plan: SkipPlan, context: PlanContext) -> TokenLayout:
    """The layout in which a plan runs. It depends only on what all ranks know, so that it is the same on each of them
    and in a resumed run."""
    allowed = context.token_layouts
    if len(allowed) == 1 or plan.binding == "sample":
        return allowed[0]
    everywhere = np.ones(plan.num_blocks, dtype=bool)
    problem = _problem(replace(context, same_rows=False), None, everywhere, compute_budget=1.0)
    if (problem.used_communication(plan) > problem.budgets(BUDGET_EPSILON)[:, 1]).any():
        allowed = _that_send_no_more("sharded", allowed)  # for which the plan was made
    return context.step_time.fastest(plan, problem, allowed)[1]


def _that_send_no_more(than: TokenLayout, layouts: Sequence[TokenLayout]) -> tuple[TokenLayout, ...]:
    """Those of the layouts in which no plan sends more than in layout `than`."""
    return tuple(layout for layout in layouts if than == "replicated" or layout != "replicated")


def _check_frozen(planned: Flags, context: PlanContext) -> None:
    """Raises PlanError where frozen blocks leave nothing to plan, on all ranks or on one of them."""
    frozen = np.flatnonzero(~planned).tolist()
    if not planned.any():
        raise PlanError(
            f"every block is frozen, so that no skip would spare a weight gradient: {context.where}planner=dense, or "
            f"let some blocks train"
        )
    for stage, blocks in enumerate(context.placement.stages):
        if not planned[list(blocks)].any():
            raise PlanError(
                f"blocks {frozen} are frozen, and pipeline stage {stage} has no others: no plan can share out the "
                f"budget; use fewer stages, or none"
            )


def _saved_plan(path: Path, context: PlanContext) -> SkipPlan:
    plan = SkipPlan.read(path)
    if plan.operations.shape != context.shape:
        raise PlanError(
            f"{context.where}file={path} has {plan.operations.shape} rows, blocks and heads, but this training "
            f"{context.shape}: score and plan with the same model, micro-batches a step and number of ranks"
        )
    return replace(plan, replicas=context.replicas)
