"""What a run writes into its results file besides its steps: itself, its scores, plans, events and evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone

from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.results import ResultsWriter
from d2ft_hpc.scores import Scores
from d2ft_hpc.training.job import Job


def record_job(writer: ResultsWriter, job: Job, environment: Mapping[str, str | int]) -> None:
    """What does not change during a run."""
    writer.put("config", {"yaml": job.config.to_yaml()})
    writer.put("environment", {}, environment)
    writer.put(
        "model",
        {},
        {
            "name": job.config.model.name,
            "num_blocks": job.executor.subnets.num_blocks,
            "num_heads": job.executor.subnets.num_heads,
            "always_flops": job.costs.always_flops,
            "full_flops": job.costs.full_flops,
            "forward_only_flops": job.costs.forward_only_flops,
        },
    )


def record_scores(writer: ResultsWriter, scores: Scores, index: int, step: int) -> None:
    writer.put(
        f"scores/{index}",
        {"forward": scores.forward, "backward": scores.backward},
        {
            "step": step,
            "seconds": scores.seconds,
            "flops": scores.flops,
            "forward_name": scores.forward_name,
            "backward_name": scores.backward_name,
            "cached": scores.cached,
        },
    )


def record_plan(
    writer: ResultsWriter, plan: SkipPlan, planned_share: float, scores: Scores | None, index: int, step: int
) -> None:
    if scores is not None:
        record_scores(writer, scores, index, step)
    writer.put(
        f"plans/{index}",
        {"operations": plan.operations},
        {
            "hash": plan.hash,
            "planner": plan.planner,
            "replicas": plan.replicas,
            "binding": plan.binding,
            "objective": plan.objective,
            "bound": plan.bound,
            "gap": plan.gap,
            "status": plan.status,
            "solve_seconds": plan.solve_seconds,
            "first_step": step,
            "planned_compute": planned_share,
        },
    )
    note(writer, step, "plan", plan.hash)


def note(writer: ResultsWriter | None, step: int, kind: str, text: str, seconds: float = 0.0) -> None:
    """Records an event. `step` is the last step before it; a run that resumes from after that step keeps the event."""
    if writer is not None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        writer.append("events", {"step": step, "time": now, "kind": kind, "text": text, "seconds": seconds})
