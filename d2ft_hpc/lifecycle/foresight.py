"""Finds out before anything is trained or evaluated whether the plans that a training asks for exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from d2ft_hpc.errors import PlanError
from d2ft_hpc.launch import agreed, share
from d2ft_hpc.lifecycle.context import PlanContext
from d2ft_hpc.lifecycle.controller import PlanController
from d2ft_hpc.lifecycle.make_plan import make_plan
from d2ft_hpc.metering import StepCosts
from d2ft_hpc.metering.flops import token_curve_of
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.planning.token_curve import TokenCurve
from d2ft_hpc.planning.tokens import TokenOptions

_TRIAL_SECONDS = 1.0
_BUDGETS = ("compute_budget", "communication_budget", "memory_budget")


def foresee_plans(plans: PlanController) -> SkipPlan:
    """The same plan on all ranks, which call it together, as `trial_plan` makes it. Raises PlanError on all of them if
    the model, the ranks or the engine cannot follow the run's plan file, or if no plan keeps the budgets."""
    context = replace(plans.context, same_rows=plans.engine.same_rows is not None)
    plan = SkipPlan.from_message(share(plans.control, lambda: trial_plan(context).to_message(), "planning"))
    if context.settings.file is not None:
        with agreed(plans.control, f"{context.where}file={context.settings.file}"):
            plans.check(plan)
    return plan


def price_of(plan: SkipPlan) -> str:
    """What plans of its kind cost beside what they spare, a sentence; empty where they keep accuracy."""
    if plan.binding == "sample" or plan.is_dense:
        return ""
    return (
        "the plan skips heads, which cost 2 to 12 points of accuracy at 0.6 where it was measured "
        "(analysis/paper_table, analysis/plan_structure); plan.planner=tokens is the one that keeps it"
    )


def trial_plan(context: PlanContext) -> SkipPlan:
    """The training's plan from a file, or one by equal scores, on this rank alone.

    Raises PlanError, which names the keys.
    """
    settings = context.settings
    # A plan that is not found in a second may exist; the run itself looks for as long as the configuration says.
    for seconds in (min(_TRIAL_SECONDS, settings.time_limit_seconds), settings.time_limit_seconds):
        # What only the real scores can tell is not decided here.
        update = {"time_limit_seconds": seconds, **dict.fromkeys(settings.entry.needs_scores_for)}
        try:
            return make_plan(replace(context, settings=settings.model_copy(update=update)), None, 0)
        except PlanError as error:
            fault = error
    raise PlanError(_with_keys(str(fault), settings, context.where)) from fault


def curve_of(
    settings: PlanConfig, costs: StepCosts, samples: Sequence[int], where: str, steps_share: float = 1.0
) -> TokenCurve | None:
    """The resolution of each step; None: images have full size, or the one that a plan from a file says.

    samples: of each step of the training, as far as they are known, else all the same; at least one. where: stands
    before the settings' keys. steps_share: the share that these steps are of those that the budget is a share of.
    Raises PlanError, which names the keys, where none keeps the budget.
    """
    budget = settings.token_share
    if budget is None:
        return None
    try:
        return token_curve_of(costs, budget / steps_share, samples)
    except PlanError as error:
        key = "compute_budget" if settings.token_budget is None else "token_budget"
        fewer = "" if steps_share == 1 else f" in {steps_share:.1%} of the steps (train.steps_share=auto)"
        fix = f", or smaller {where}options.sides" if isinstance(settings.options, TokenOptions) else ""
        raise PlanError(f"{where}{key}={budget:g}{fewer}: {error}{fix}") from None


def _with_keys(text: str, settings: PlanConfig, where: str) -> str:
    """The message with the settings' keys for what it speaks of."""
    if settings.file is not None:
        return f"{'' if text.startswith(f'{where}file=') else f'{where}file='}{text}"
    values = {key: getattr(settings, key) for key in _BUDGETS}
    values |= {f"options.{key}": value for key, value in settings.options}
    if text.startswith(tuple(f"{key}=" for key in values)):
        return f"{where}{text}"
    in_words = text.replace("_", " ")  # planners' messages name a key as it is, or so
    told = ", ".join(
        f"{where}{key}={value:g}"
        for key, value in values.items()
        if value is not None and key.removeprefix("options.").replace("_", " ") in in_words
    )
    return f"{told}: {text}" if told else text
