"""What a job measures on its ranks before it starts: passes, messages, memory, and costs for its planner; and how it
describes its model, whose parameters no engine has spread yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from d2ft_hpc.lifecycle import PlanCosts
from d2ft_hpc.metering.activation_bytes import ActivationBytes, measure_activation_bytes
from d2ft_hpc.metering.all_reduce import AllReduceSeconds, measure_all_reduce
from d2ft_hpc.metering.memory import release_unused
from d2ft_hpc.metering.profile import PassProfile, profile_passes
from d2ft_hpc.recording.provenance import describe_model
from d2ft_hpc.results.schema import Scalar
from d2ft_hpc.training.job import Job
from d2ft_hpc.training.plan_costs import find_costs


@dataclass(frozen=True)
class Measurements:
    profile: PassProfile
    all_reduce: AllReduceSeconds
    kept: ActivationBytes | None
    """None where plans do not depend on it."""
    plan_costs: PlanCosts
    model: tuple[dict[str, Any], dict[str, Scalar]]
    """As `describe_model` says."""


def measure_job(job: Job) -> Measurements:
    """All ranks call it together, before the engine is built and any random state is restored."""
    shape = (job.config.data.micro_batch_size, *job.config.data.image_shape)
    profile = profile_passes(job.model, job.executor, shape, job.precision)
    kept = None
    if job.config.plans_by_free_memory:
        kept = measure_activation_bytes(job.model, job.executor, shape, job.precision)
    release_unused(job.device)
    all_reduce = measure_all_reduce(job.device)
    model = describe_model(job.model, job.executor.subnets, job.costs)
    return Measurements(profile, all_reduce, kept, find_costs(job, profile, all_reduce), model)
