"""What the plans of a run depend on, and when they are due; `d2ft_hpc.lifecycle` makes them."""

from __future__ import annotations

from d2ft_hpc.config import EngineConfig
from d2ft_hpc.lifecycle import PlanContext, PlanCosts
from d2ft_hpc.parallel.rank_layout import Placement
from d2ft_hpc.parallel.tensor import layouts_of
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.training.job import Job


def is_due(config: PlanConfig, *, epoch: int, step_of_epoch: int, steps_done: int) -> bool:
    """Whether a plan is to be made before this step; steps and epochs count from 0."""
    interval = config.replan.interval
    if interval is None:
        return steps_done == 0
    if interval.unit == "epoch":
        return step_of_epoch == 0 and epoch % interval.number == 0
    return steps_done % interval.number == 0


def plan_context(job: Job, placement: Placement, costs: PlanCosts) -> PlanContext:
    """costs: what the first plan reckons with."""
    config, model = job.config, job.model
    family = job.executor.subnets.family
    numbers = config.data.micro_batch_size * family.numbers_between(model)
    configured = config.engine.token_layout if config.plan.token_share is None else "replicated"
    return PlanContext(
        config.plan,
        placement,
        job.costs,
        costs,
        slots=config.data.slots,
        micro_batch_size=config.data.micro_batch_size,
        seed=config.run.seed,
        replicas_meet=meets_every_block(config.engine),
        activation_bytes=numbers * (4 if config.engine.precision == "fp32" else 2),
        token_layouts=(
            layouts_of(family, family.blocks(model), family.tokens_between(model))
            if configured == "auto"
            else (configured,)
        ),
        total_steps=job.total_steps,
        curve=job.curve,
    )


def compute_in_words(job: Job, plan: SkipPlan) -> str:
    """What the run's steps take under the plan's operations, and of what that is a share."""
    curve, given = job.curve, job.config.train.steps_share
    share = (
        job.costs.planned_share(plan)
        if curve is None
        else job.costs.planned_share(plan.at(None)) * curve.share
    )
    told = f"{share:.1%} of the dense compute"
    if job.config.steps_share == 1:
        return told
    whole = f"{job.share_of_epochs * share:.1%} of that of all {job.config.train.epochs} epochs"
    return f"{told} of its {job.total_steps} steps, {whole} (train.steps_share={given})"


def meets_every_block(engine: EngineConfig) -> bool:
    """Whether replicas wait for each other in every block, as under ZeRO 3 and FSDP2, which gather its weights."""
    return engine.data_parallel in ("zero3", "fsdp2")
