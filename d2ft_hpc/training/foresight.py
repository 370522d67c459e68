"""Finds out before anything is trained or evaluated whether the plans that a run asks for exist."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from d2ft_hpc.config import PlanConfig
from d2ft_hpc.engines.engine import Engine
from d2ft_hpc.errors import PlanError
from d2ft_hpc.launch import agreed, share
from d2ft_hpc.parallel.layout import Placement
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.training.job import Job
from d2ft_hpc.training.plan_costs import PlanCosts
from d2ft_hpc.training.plans import solve_here

_TRIAL_SECONDS = 1.0
_BUDGETS = ("compute_budget", "communication_budget", "memory_budget")


def foresee_plans(job: Job, placement: Placement, costs: PlanCosts, engine: Engine) -> None:
    """Raises PlanError on all ranks, which call it together, where the run's plan file is none that the model, the
    ranks and the engine can follow, or no plan keeps the budgets."""
    plan = SkipPlan.from_bytes(
        share(
            job.control,
            lambda: trial_plan(job, placement, costs, same_rows=engine.same_rows is not None).to_bytes(),
            "planning",
        )
    )
    if job.config.plan.file is not None:
        with agreed(job.control, f"plan.file={job.config.plan.file}"):
            engine.check(plan)


def trial_plan(job: Job, placement: Placement, costs: PlanCosts, *, same_rows: bool = False) -> SkipPlan:
    """The run's plan from a file, or one by equal scores under the least of the run's budgets, on this rank alone.

    Raises PlanError, which names the keys.
    """
    config, total = job.config.plan, job.total_steps
    every = config.replan.every or total
    if config.replan.unit == "epochs" and config.replan.every is not None:
        every *= job.sampler.batches_per_epoch
    last = (total - 1) // every * every  # budgets only fall
    # What a second does not find may exist; the run itself looks for as long as the configuration says.
    for seconds in (min(_TRIAL_SECONDS, config.time_limit_seconds), config.time_limit_seconds):
        tried = config.model_copy(update={"time_limit_seconds": seconds, **_left_open(job)})
        trial = replace(job, config=job.config.model_copy(update={"plan": tried}))
        try:
            return solve_here(trial, placement, costs, None, 0, last, same_rows=same_rows)
        except PlanError as error:
            fault = error
    raise PlanError(_with_keys(str(fault), config)) from fault


def _left_open(job: Job) -> dict[str, Any]:
    """Demands of which only the plan by the real scores shows whether the planner meets them, as if there were none."""
    config, rows = job.config.plan, job.plan_shape[0]
    names = set(config.entry.needs_scores_for)
    of_options = names & set(type(config.options).model_fields)
    if getattr(config.options, "coverage", 0) > rows:  # which no scores help
        of_options -= {"coverage"}
    defaults = {name: type(config.options).model_fields[name].default for name in of_options}
    left = dict.fromkeys(names & set(PlanConfig.model_fields))
    return {**left, "options": config.options.model_copy(update=defaults)}


def _with_keys(text: str, config: PlanConfig) -> str:
    """The message with the configuration's keys for what it speaks of."""
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
    """As planners' messages name what a key of the configuration says."""
    name = key.rpartition(".")[2]
    return name, name.replace("_", " ")
