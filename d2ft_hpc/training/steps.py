"""Runs single steps through the engine and measures what each one did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from d2ft_hpc.engines.engine import Engine, MicroBatch
from d2ft_hpc.metering import Metered, meter
from d2ft_hpc.metering.memory import reset_peak, used_bytes
from d2ft_hpc.metering.phases import phase, timed_step
from d2ft_hpc.results.schema import BYTE_KINDS
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

    def run(self, batches: Iterator[list[MicroBatch]], *, step: int, epoch: int, plan: int) -> StepRecord:
        """One optimiser step on this replica's next batch; on all ranks together."""
        device = self._job.device
        reset_peak(device)
        with timed_step(device) as times:
            with phase("data"):
                micro_batches = next(batches)
            planned = self._planned_flops(micro_batches)
            if plan == self._metered_plan:
                report = self._engine.step(micro_batches)
            else:
                with meter() as self._metered:
                    report = self._engine.step(micro_batches)
                self._metered_plan, self._metered_planned_flops = plan, planned
            loss, gradient_norm = _on_host(report.loss), _on_host(report.gradient_norm)
        samples = sum(len(labels) for _, labels in micro_batches)
        return StepRecord(
            step=step,
            epoch=epoch,
            plan=plan,
            learning_rate=report.learning_rate,
            gradient_norm=gradient_norm,
            loss=loss,
            times=times,
            of_rank={
                "rank_samples": samples,
                "dense_flops": self._job.costs.dense_flops * samples,
                "planned_flops": planned,
                "executed_flops": self._metered.flops * planned / self._metered_planned_flops,
                "bytes_sent": sum(self._metered.bytes_sent.values()),
                **_bytes_by_kind(self._metered.bytes_sent),
                "memory_bytes": used_bytes(device),
            },
        )

    def _planned_flops(self, micro_batches: list[MicroBatch]) -> float:
        """What the plan promises for these micro-batches."""
        plan = self._job.executor.plan
        assert plan is not None
        rows = self._job.costs.planned_flops(plan.for_replica(self._job.control.rank))
        return float(sum(flops * len(labels) for flops, (_, labels) in zip(rows, micro_batches, strict=True)))


def _on_host(value: float | Tensor) -> float | Tensor:
    """The value on its way to the host: there when the step's times are ready, and nothing waits for it now."""
    if not isinstance(value, Tensor) or value.device.type != "cuda":
        return value
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value.detach(), non_blocking=True)


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
