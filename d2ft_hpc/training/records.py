"""Every rank's figures of every step, gathered to rank 0 some steps at a time and written to the results file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from d2ft_hpc.launch import Control
from d2ft_hpc.results import ResultsWriter

RANK_COLUMNS = (
    "loss",
    "samples",
    "dense_flops",
    "planned_flops",
    "executed_flops",
    "bytes_sent",
    "data_seconds",
    "forward_seconds",
    "backward_seconds",
    "optimizer_seconds",
    "step_seconds",
)
"""What each rank records of a step; units are the results schema's."""


@dataclass(frozen=True)
class StepRecord:
    """One step as this rank saw it."""

    step: int
    epoch: int
    plan: int
    learning_rate: float
    gradient_norm: float
    of_rank: dict[str, float]
    """A value for each of RANK_COLUMNS."""


class StepRecorder:
    """Collects step records; rank 0 passes a writer, the others None."""

    def __init__(self, control: Control, writer: ResultsWriter | None, gather_every_steps: int = 10) -> None:
        self._control, self._writer = control, writer
        self._gather_every_steps = gather_every_steps
        self._pending: list[StepRecord] = []

    def add(self, record: StepRecord) -> None:
        """All ranks add the same steps, so that all gather at the same one."""
        self._pending.append(record)
        if len(self._pending) >= self._gather_every_steps:
            self.gather()

    def gather(self) -> None:
        """Writes what is pending; on all ranks together."""
        own = np.array(
            [[record.of_rank[column] for column in RANK_COLUMNS] for record in self._pending], "<f8"
        )
        parts = self._control.all_gather(own.tobytes())
        if self._writer is not None and self._pending:
            values = np.stack(
                [np.frombuffer(part, "<f8").reshape(own.shape) for part in parts]
            )  # [rank, step, column]
            for index, record in enumerate(self._pending):
                by_column = dict(zip(RANK_COLUMNS, values[:, index].T, strict=True))
                losses, samples = by_column.pop("loss"), by_column.pop("samples")
                self._writer.append(
                    "steps",
                    {
                        "step": record.step,
                        "epoch": record.epoch,
                        "plan": record.plan,
                        "learning_rate": record.learning_rate,
                        "gradient_norm": record.gradient_norm,
                        "loss": float(losses.mean()),
                        "samples": int(samples.sum()),
                        **by_column,
                    },
                )
        self._pending = []
