"""Checks of what the run needs and how long it takes: data set, weights, time limit."""

from __future__ import annotations

import math

import torch

from d2ft_hpc.config import RunConfig
from d2ft_hpc.data.datasets import evenly_spaced
from d2ft_hpc.doctor.finding import Finding, of_error
from d2ft_hpc.errors import D2ftError, DataError
from d2ft_hpc.launch import Control, gathered
from d2ft_hpc.lifecycle.foresight import price_of, trial_plan
from d2ft_hpc.metering.profile import fastest_pass
from d2ft_hpc.planning import Operation
from d2ft_hpc.training.job import Job, set_up
from d2ft_hpc.training.model_placement import place_in_order
from d2ft_hpc.training.plan_context import plan_context
from d2ft_hpc.training.plan_costs import costs_unmeasured

_FIX_WEIGHTS = (
    "a file's path in model.weights; those of a hub are fetched on a login node by HF_HUB_OFFLINE=0 d2ft-hpc doctor "
    "CONFIG, compute nodes then find them in the cache"
)

_FIX_DATA = "data.root=FOLDER"

_DECODED_IMAGES = 100
"""How many images of each data set are decoded."""


def check_parts(
    config: RunConfig, control: Control, device: torch.device
) -> tuple[Job | None, list[Finding]]:
    """Opens the data set, decodes some of its images and builds the model with its weights, on this rank."""
    try:
        job = set_up(config, control, device)
    except DataError as error:
        return None, [of_error("data", error, _FIX_DATA)]
    except Exception as error:  # hubs, files and timm answer with anything
        return None, [of_error("model", error, _FIX_WEIGHTS)]
    try:
        for images in (job.train_set, job.evaluation_set):
            for index in evenly_spaced(len(images), _DECODED_IMAGES):
                images.read([index], [[index]])
    except Exception as error:  # and so do timm's transforms
        return None, [of_error("data", error, _FIX_DATA)]
    parameters = sum(parameter.numel() for parameter in job.model.parameters())
    return job, [
        *(Finding("data", "warning", *remark.rsplit("; ", 1)) for remark in job.remarks),
        Finding("data", "ok", f"{len(job.train_set)} training images of {job.train_set.num_classes} classes"),
        Finding("model", "ok", f"{config.model.name}, {parameters / 1e6:.1f} M parameters"),
    ]


def check_plans(job: Job) -> list[Finding]:
    """Whether the plan file fits, or a plan keeps the budgets, by counted costs; all ranks call it together."""
    if job.control.rank:
        return []
    try:
        context = plan_context(job, place_in_order(job), costs_unmeasured(job))
        plan = trial_plan(context)
    except D2ftError as error:
        return [of_error("plan", error, "raise plan.compute_budget")]
    share, images = job.costs.planned_share(plan), ""
    if context.curve is not None:
        share *= context.curve.share
        images = f", images of {context.curve.in_words(job.executor.images.patch_size)}"
    price = price_of(plan)
    return [
        Finding("plan", "ok", f"planner {plan.planner}, {share:.1%} of the dense compute{images}"),
        *([Finding("plan", "warning", *price.rsplit("; ", 1))] if price else []),
    ]


def check_time(job: Job, left: float | None) -> Finding:
    """Whether the run fits into the time limit, by the time of a micro-batch; all ranks call it together."""
    config = job.config
    images_shape = (config.data.micro_batch_size, *config.data.image_shape)
    own = fastest_pass(job.model, job.executor, Operation.FULL, images_shape, job.precision)
    of_ranks = gathered(job.control, own * config.data.slots)
    plan = config.plan
    share = plan.compute_budget if plan.entry.keeps_budgets or plan.entry.scales_images else 1.0
    expected = max(of_ranks) * share * job.total_steps
    steps = f"{job.total_steps} step{'s' * (job.total_steps > 1)}"
    text = f"about {_clock(expected)} of training expected ({steps})"
    if left is None:
        return Finding("time", "ok", f"{text}; no time limit known")
    text += f", {_clock(left)} left of the time limit"
    if expected < 0.9 * left:
        return Finding("time", "ok", text)
    if config.train.checkpoint_every is None:
        return Finding("time", "failed", text, "longer --time, or train.checkpoint_every='10 minutes'")
    jobs = math.ceil(expected / max(left, 1.0))
    fix = "longer --time; slurm/train.sh requeues itself"
    return Finding("time", "warning", f"{text}: {jobs} jobs in a row", fix)


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes else f"{seconds:.0f} s"
