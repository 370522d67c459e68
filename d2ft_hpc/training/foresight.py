"""Finds out before anything is trained or evaluated whether the plans that a run asks for exist."""

from __future__ import annotations

from dataclasses import replace

from d2ft_hpc.errors import PlanError
from d2ft_hpc.launch import agreed, share
from d2ft_hpc.lifecycle.context import PlanContext
from d2ft_hpc.lifecycle.controller import PlanController
from d2ft_hpc.lifecycle.make_plan import make_plan
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.planning import SkipPlan

_TRIAL_SECONDS = 1.0
_BUDGETS = ("compute_budget", "communication_budget", "memory_budget")


def foresee_plans(plans: PlanController) -> None:
    """Raises PlanError on all ranks, which call it together, if the model, the ranks or the engine cannot follow the
    run's plan file, or if no plan keeps the budgets."""
    context = replace(plans.context, same_rows=plans.engine.same_rows is not None)
    plan = SkipPlan.from_message(share(plans.control, lambda: trial_plan(context).to_message(), "planning"))
    if context.settings.file is not None:
        with agreed(plans.control, f"plan.file={context.settings.file}"):
            plans.check(plan)


def trial_plan(context: PlanContext) -> SkipPlan:
    """The run's plan from a file, or one by equal scores, on this rank alone.

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
    raise PlanError(_with_keys(str(fault), settings)) from fault


def _with_keys(text: str, config: PlanConfig) -> str:
    """The planner's message with the configuration's keys in front."""
    if config.file is not None:
        return f"{'' if text.startswith('plan.file=') else 'plan.file='}{text}"
    values = {f"plan.{key}": getattr(config, key) for key in _BUDGETS}
    values |= {f"plan.options.{key}": value for key, value in config.options}
    told = ", ".join(
        f"{key}={value:g}"
        for key, value in values.items()
        if value is not None and any(name in text for name in _names_of(key))
    )
    return text if not told or text.startswith("plan.") else f"{told}: {text}"


def _names_of(key: str) -> tuple[str, str]:
    """The words by which planners' messages name a key of the configuration."""
    name = key.rpartition(".")[2]
    return name, name.replace("_", " ")
