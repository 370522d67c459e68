"""Checks of what the run needs and how long it takes: data set, weights, time limit."""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from torch import nn

from d2ft_hpc.config import RunConfig
from d2ft_hpc.data.datasets import LabelledImages, evenly_spaced
from d2ft_hpc.doctor.finding import Finding, of_error
from d2ft_hpc.errors import ConfigError, D2ftError, DataError
from d2ft_hpc.launch import Control, gathered
from d2ft_hpc.lifecycle.foresight import price_of, trial_plan
from d2ft_hpc.metering.profile import fastest_pass
from d2ft_hpc.parallel.rank_layout import RankLayout
from d2ft_hpc.planning import Operation
from d2ft_hpc.training.job import Job, layout_of, make_model, open_images, set_up
from d2ft_hpc.training.model_placement import place_in_order
from d2ft_hpc.training.plan_context import compute_in_words, plan_context
from d2ft_hpc.training.plan_costs import costs_unmeasured

_FIX = {
    "data": "data.root=FOLDER",
    "config": "correct the key",
    "model": "a file's path in model.weights; those of a hub are fetched on a login node by HF_HUB_OFFLINE=0 d2ft-hpc "
    "doctor CONFIG, compute nodes then find them in the cache",
}
"""By check."""

_DECODED_IMAGES = 100
"""How many images of each data set are decoded."""


_ANY_CLASSES = 2
"""Of a model that is looked at without the data set."""


def check_parts(
    config: RunConfig, control: Control, device: torch.device
) -> tuple[Job | None, nn.Module | None, list[Finding]]:
    """Opens the data set, decodes some of its images and builds the model with its weights, on this rank. Job and model
    are None where they cannot be made."""
    try:
        job = set_up(config, control, device)
    except Exception as error:  # hubs, files and timm answer with anything
        failed = _failed(_part_of(error), error)
        model, of_model = _model_alone(config)  # what failed may not be all that is wrong
        alone = (found for found in (_data_alone(config, control), of_model) if found.check != failed.check)
        return None, model, [failed, *alone]
    remarks = (
        Finding(_section(remark) or "data", "warning", *remark.rsplit("; ", 1)) for remark in job.remarks
    )
    of_data = _decoded(job.train_set, job.evaluation_set)
    return job, job.model, [*remarks, of_data, _of_model(config, job.model)]


def _failed(part: str, error: Exception) -> Finding:
    return of_error(part, error, _FIX[part])


def _part_of(error: Exception) -> str:
    """The check that an error of `set_up` belongs to; most of those about the configuration begin with its key."""
    section = "data" if isinstance(error, DataError) else _section(str(error))
    return section or ("config" if isinstance(error, ConfigError) else "model")


def _section(text: str) -> str:
    """Of the key that a text begins with; empty if that is no check's, or none."""
    section = text.partition(".")[0]
    return section if section in _FIX else ""


def _data_alone(config: RunConfig, control: Control) -> Finding:
    layout = RankLayout.of(1, 0)
    with suppress(ConfigError):  # which `set_up` raised, too
        layout = layout_of(config, control)
    try:
        train_set, evaluation_set, _ = open_images(config, layout)
    except Exception as error:  # as above
        return _failed("data", error)
    return _decoded(train_set, evaluation_set)


def _model_alone(config: RunConfig) -> tuple[nn.Module | None, Finding]:
    try:
        model = make_model(config, _ANY_CLASSES)
    except Exception as error:  # as above
        return None, _failed("model", error)
    return model, _of_model(config, model)


def _decoded(train_set: LabelledImages, evaluation_set: LabelledImages) -> Finding:
    try:
        for images in (train_set, evaluation_set):
            for index in evenly_spaced(len(images), _DECODED_IMAGES):
                images.read([index], [[index]])
    except Exception as error:  # and so do timm's transforms
        return _failed("data", error)
    return Finding("data", "ok", f"{len(train_set)} training images of {train_set.num_classes} classes")


def _of_model(config: RunConfig, model: nn.Module) -> Finding:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Finding("model", "ok", f"{config.model.name}, {parameters / 1e6:.1f} M parameters")


def check_plans(job: Job) -> list[Finding]:
    """Whether the plan file fits, or a plan keeps the budgets, by counted costs; all ranks call it together."""
    if job.control.rank:
        return []
    try:
        context = plan_context(job, place_in_order(job), costs_unmeasured(job))
        plan = trial_plan(context)
    except D2ftError as error:
        return [of_error("plan", error, "raise plan.compute_budget")]
    images = ""
    if context.curve is not None:
        images = f", images of {context.curve.in_words(job.executor.images.patch_size)}"
    price = price_of(plan)
    return [
        Finding("plan", "ok", f"planner {plan.planner}, {compute_in_words(job, plan)}{images}"),
        *([Finding("plan", "warning", *price.rsplit("; ", 1))] if price else []),
    ]


def check_time(job: Job, left: float | None) -> Finding:
    """Whether the run fits into the time limit, by the time of a micro-batch; all ranks call it together."""
    config = job.config
    images_shape = (config.data.micro_batch_size, *config.data.image_shape)
    own = fastest_pass(job.model, job.executor, Operation.FULL, images_shape, job.precision)
    of_ranks = gathered(job.control, own * config.data.slots)
    plan = config.plan
    share = plan.compute_budget if plan.entry.keeps_budgets else 1.0
    if plan.entry.scales_images and job.curve is not None:
        share = job.curve.share
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
