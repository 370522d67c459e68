"""Runs single steps through the engine and measures what each one did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from d2ft_hpc.engines.engine import Engine, MicroBatch, StepReport
from d2ft_hpc.engines.planned_bytes import PlannedBytes
from d2ft_hpc.lifecycle import PlanContext
from d2ft_hpc.lifecycle.costs import costs_of_part
from d2ft_hpc.metering import Metered, meter
from d2ft_hpc.metering.flops import RankWork
from d2ft_hpc.metering.memory import reset_peak, used_bytes
from d2ft_hpc.metering.phases import phase, timed_step
from d2ft_hpc.planning import Operation
from d2ft_hpc.recording.step_recorder import StepRecord, on_host
from d2ft_hpc.results.schema import BYTE_KINDS
from d2ft_hpc.selection.build import count_scoring
from d2ft_hpc.training.job import Job


class StepRunner:
    """Meters the first step under each plan and records every step. It also meters the run's second step, since in
    the first one ZeRO 3 learns the order of the weights and sends more. The other steps under a plan run the same
    operators on other samples, so their executed FLOPs are the metered ones times their share of samples, and their
    bytes are the metered ones.
    """

    def __init__(self, job: Job, engine: Engine, context: PlanContext) -> None:
        placement = context.placement
        self._job, self._engine, self._own = job, engine, placement.own
        self._costs = costs_of_part(job.costs, job.layer_flops, placement)
        if job.selection is not None and job.config.engine.kind.scores_with_own_model:
            job.selection.scorer.bind(engine.logits)
            score_flops = count_scoring(job.selection, job.config.data.image_shape, job.device)
            self._costs = replace(self._costs, score_flops=score_flops)
        self._planned_bytes = PlannedBytes(
            job.model,
            engine.executor,
            context,
            precision=job.config.engine.precision,
            data_parallel=job.config.engine.data_parallel,
        )
        self._steps_done, self._metered_plan = 0, -1
        self._metered = Metered()
        self._metered_planned_flops = 1.0

    def run(
        self,
        batches: Iterator[list[MicroBatch]],
        *,
        step: int,
        epoch: int,
        plan: int,
    ) -> StepRecord:
        """One optimiser step on this replica's next batch; all ranks call it together."""
        device = self._job.device
        reset_peak(device)
        with timed_step(device) as times:
            with phase("data"):
                micro_batches = next(batches)
            report, work = self._metered_step(micro_batches, step, plan)
            loss, gradient_norm = on_host(report.loss), on_host(report.gradient_norm)
        self._steps_done += 1
        samples = sum(len(labels) for _, labels in micro_batches)
        return StepRecord(
            step=step,
            epoch=epoch,
            plan=plan,
            learning_rate=report.learning_rate,
            gradient_norm=gradient_norm,
            loss=loss,
            times=times,
            skipped=report.skipped,
            of_rank={
                # Ranks that share a replica count its samples once.
                "rank_samples": samples if self._job.layout.leads_replica else 0,
                "dense_flops": self._costs.dense_flops * samples,
                "planned_flops": work.planned_flops,
                "executed_flops": self._metered.flops * work.planned_flops / self._metered_planned_flops,
                "full_rows": work.full_rows,
                "forward_only_rows": work.forward_only_rows,
                "left_out_rows": work.left_out_rows,
                "bytes_sent": sum(self._metered.bytes_sent.values()),
                **_bytes_by_kind(self._metered.bytes_sent),
                **self._planned_bytes.columns(),
                "memory_bytes": used_bytes(device),
            },
        )

    def _metered_step(
        self, micro_batches: list[MicroBatch], step: int, plan: int
    ) -> tuple[StepReport, RankWork]:
        if plan == self._metered_plan and self._steps_done > 1:
            return self._step(micro_batches, step)
        with meter() as self._metered:
            report, work = self._step(micro_batches, step)
        self._metered_plan, self._metered_planned_flops = plan, work.planned_flops
        return report, work

    def _step(self, micro_batches: list[MicroBatch], step: int) -> tuple[StepReport, RankWork]:
        """Trains on these micro-batches, or on those of their samples that the plan lets train."""
        plan, costs = self._engine.executor.plan, self._costs
        assert plan is not None
        replica = self._job.layout.replica
        if plan.binding == "slot":
            samples = [len(labels) for _, labels in micro_batches]
            work = costs.work(plan, replica, self._own, range(plan.slots), samples)
            return self._engine.step(micro_batches), work
        assert self._job.selection is not None
        share = float((plan.for_replica(replica) == Operation.FULL).mean())
        with phase("forward"):
            chosen = self._job.selection(micro_batches, step, share)
        scored, trained = (sum(len(labels) for _, labels in batch) for batch in (micro_batches, chosen))
        planned = scored * costs.score_flops + trained * costs.dense_flops
        return self._engine.step(chosen), RankWork(planned, trained, 0, scored - trained)


def _bytes_by_kind(by_collective: Mapping[str, int]) -> dict[str, float]:
    """The results' columns of bytes, from the names that torch.distributed's operators have."""
    names = {"send": "point_to_point", "recv": "point_to_point"}
    names |= {kind.replace("_", ""): kind for kind in BYTE_KINDS}
    columns = {f"{kind}_bytes": 0.0 for kind in BYTE_KINDS}
    for collective, count in by_collective.items():
        plain = collective.replace("_", "")
        kind = next((kind for start, kind in names.items() if plain.startswith(start)), "other")
        columns[f"{kind}_bytes"] += count
    return columns
