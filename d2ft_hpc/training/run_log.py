"""What a run prints and records besides its steps: its own description, plans, evaluations and events."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict

from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.launch.watch import Watch
from d2ft_hpc.lifecycle import PlanListener
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.recording.entries import note, record_plan, record_scores
from d2ft_hpc.results import ResultsWriter
from d2ft_hpc.scores import Scores
from d2ft_hpc.training.checkpoint import Position
from d2ft_hpc.training.evaluate import Evaluation
from d2ft_hpc.training.job import Job
from d2ft_hpc.training.measurements import Measurements
from d2ft_hpc.training.progress import Progress
from d2ft_hpc.training.tensorboard import TensorBoard

CONFUSION_CLASSES = 256
"""With more classes, evaluations record the accuracy of each class but no confusion."""


class RunLog(PlanListener):
    """What one run reports on this rank. Rank 0 prints, and also writes once its files are open."""

    def __init__(self, job: Job, executor: PlanExecutor, progress: Progress, watch: Watch) -> None:
        self.progress, self.watch = progress, watch
        self.writer: ResultsWriter | None = None
        self.tensorboard: TensorBoard | None = None
        self._job, self._executor = job, executor

    def enter(self, phase: str, *, allowed_seconds: float = 0.0) -> None:
        self.watch.enter(phase, allowed_seconds=allowed_seconds)

    def say(self, text: str) -> None:
        self.progress.say(text)

    def scored(self, scores: Scores, step: int) -> None:
        if self.writer is not None:
            record_scores(self.writer, scores, step)

    def planned(self, plan: SkipPlan, step: int, seconds: float) -> None:
        if self.writer is not None:
            record_plan(self._job.costs, self._executor, self.writer, plan, step, seconds)

    def note(self, step: int, kind: str, text: str, seconds: float = 0.0) -> None:
        if self.writer is not None:
            note(self.writer, step, kind, text, seconds)

    def evaluated(self, position: Position, result: Evaluation) -> None:
        """An evaluation of the present model."""
        self.progress.evaluated(result.accuracy, result.seconds)
        self.say(
            f"evaluation after {self._job.length_in_words(position.steps_done)}: accuracy {result.accuracy:.2%}, "
            f"loss {result.loss:.4f} ({result.samples} images, {result.seconds:.1f} s)"
        )
        if self.writer is not None:
            self.writer.append(
                "evaluations",
                {
                    "step": position.steps_done,
                    "epoch": position.epochs_done,
                    "accuracy": result.accuracy,
                    "loss": result.loss,
                    "samples": result.samples,
                    "seconds": result.seconds,
                    "class_accuracy": result.class_accuracy,
                    **({"confusion": result.confusion} if len(result.confusion) <= CONFUSION_CLASSES else {}),
                },
            )
        if self.tensorboard is not None:
            self.tensorboard.evaluation(position.steps_done, result)


def record_job(
    job: Job, writer: ResultsWriter, environment: Mapping[str, str | int], measured: Measurements
) -> None:
    """What does not change during a run."""
    writer.put("config", {"yaml": job.config.to_yaml()})
    writer.put("environment", {}, environment)
    parameters, attributes = measured.model
    writer.put(
        "model",
        {**parameters, "class_name": job.train_set.class_names},
        {
            "name": job.config.model.name,
            **attributes,
            "dense_pass_seconds": measured.profile.dense_seconds,
            "always_pass_seconds": measured.profile.always_seconds,
            "dense_kept_bytes": measured.kept.of(job.costs.num_subnets) if measured.kept else math.nan,
            "plan_costs": json.dumps(asdict(measured.plan_costs)),
            "all_reduce_seconds": measured.all_reduce.latency,
            "all_reduce_seconds_per_byte": measured.all_reduce.per_byte,
        },
    )
