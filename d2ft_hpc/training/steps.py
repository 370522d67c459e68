"""Runs single steps through the engine and measures what each one did."""

from __future__ import annotations

import time

import torch

from d2ft_hpc.engines.engine import Engine, MicroBatch, StepReport
from d2ft_hpc.metering import Metered, meter
from d2ft_hpc.planning import Operation
from d2ft_hpc.training.job import Job
from d2ft_hpc.training.records import StepRecord


class StepRunner:
    """Meters the first step under each plan and records every step.

    The other steps under a plan run the same operators on other samples, so their executed FLOPs are the metered
    ones times their share of samples, and their bytes are the metered ones.
    """

    def __init__(self, job: Job, engine: Engine) -> None:
        self._job, self._engine = job, engine
        self._metered_plan = -1
        self._metered = Metered()
        self._metered_planned_flops = 1.0

    def run(
        self, micro_batches: list[MicroBatch], *, step: int, epoch: int, plan: int, data_seconds: float
    ) -> StepRecord:
        """One optimiser step on this replica's micro-batches; on all ranks together."""
        samples = sum(len(labels) for _, labels in micro_batches)
        start = time.perf_counter()
        if plan == self._metered_plan:
            report, planned = self._step(micro_batches, step)
        else:
            with meter() as self._metered:
                report, planned = self._step(micro_batches, step)
            self._metered_plan, self._metered_planned_flops = plan, planned
        if self._job.device.type == "cuda":
            torch.cuda.synchronize(self._job.device)
        step_seconds = time.perf_counter() - start
        return StepRecord(
            step=step,
            epoch=epoch,
            plan=plan,
            learning_rate=report.learning_rate,
            gradient_norm=report.gradient_norm,
            of_rank={
                "loss": report.loss,
                "samples": samples,
                "dense_flops": self._job.costs.dense_flops * samples,
                "planned_flops": planned,
                "executed_flops": self._metered.flops * planned / self._metered_planned_flops,
                "bytes_sent": sum(self._metered.bytes_sent.values()),
                "data_seconds": data_seconds,
                **{f"{phase}_seconds": seconds for phase, seconds in report.seconds.items()},
                "step_seconds": data_seconds + step_seconds,
            },
        )

    def _step(self, micro_batches: list[MicroBatch], step: int) -> tuple[StepReport, float]:
        """Trains on these micro-batches, or on what the plan's samples are of them; also the FLOPs that it promises."""
        plan, costs = self._job.executor.plan, self._job.costs
        assert plan is not None
        operations = plan.for_replica(self._job.control.rank)
        if plan.binding == "slot":
            flops = zip(costs.planned_flops(operations), micro_batches, strict=True)
            return self._engine.step(micro_batches), float(
                sum(each * len(labels) for each, (_, labels) in flops)
            )
        assert self._job.selection is not None
        share = float((operations == Operation.FULL).mean())
        chosen = self._job.selection(micro_batches, step, share)
        scored, trained = (sum(len(labels) for _, labels in batch) for batch in (micro_batches, chosen))
        return self._engine.step(chosen), scored * costs.score_flops + trained * costs.dense_flops
