"""Every rank's figures of every step, on their way to the results file while training goes on."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2ft_hpc.launch import Control
from d2ft_hpc.launch.async_gather import PendingGather
from d2ft_hpc.metering.phases import StepTimes
from d2ft_hpc.results import ResultsWriter
from d2ft_hpc.results.reader import waiting
from d2ft_hpc.results.schema import PHASES, RANK_FIELDS, Array

_PATIENCE_SECONDS = 60.0
_COLUMNS = tuple(name for name in RANK_FIELDS if name != "waiting_seconds")
"""What each rank sends for each step, as float64; what it did not measure is NaN."""


@dataclass(frozen=True)
class StepRecord:
    """One step as this rank saw it.

    of_rank: values of per-rank columns of the results' steps. skipped: as in `StepReport`. times, loss and
    gradient_norm may still be on their way from the GPU until the times are ready.
    """

    step: int
    epoch: int
    plan: int
    learning_rate: float
    gradient_norm: float | Tensor
    loss: float | Tensor
    times: StepTimes
    of_rank: Mapping[str, float]
    skipped: bool = False


class StepRecorder:
    """Collects step records and passes them on without waiting for any rank, GPU or disk.

    All ranks add the same steps. Rank 0 passes the run's writer; with a file for each rank, every rank also passes a
    writer of its own and nothing is gathered. As a context manager it ends with `finish`; after an exception it keeps
    what rank 0 has.
    """

    def __init__(
        self,
        control: Control,
        writer: ResultsWriter | None,
        own_writer: ResultsWriter | None = None,
        on_step: Callable[[Mapping[str, Any]], None] | None = None,
        *,
        first_plan: int = 0,
    ) -> None:
        """on_step: gets each row of the results' steps, too. first_plan: how many plans the run had made before the
        first one of the writer's record."""
        self._first_plan = first_plan
        self._control, self._writer, self._own_writer, self._on_step = control, writer, own_writer, on_step
        self._measured: deque[StepRecord] = deque()
        self._sent: deque[tuple[StepRecord, Array, PendingGather]] = deque()
        self._recording_seconds = 0.0
        self._seconds, self._data_seconds, self._first_ended = 0.0, 0.0, False
        self.fault = ""
        """This rank's first loss that is not finite, as the steps done before, a blank, and the loss. Empty while all
        losses are finite."""

    @property
    def share_of_waiting_for_data(self) -> float:
        """Of the seconds of this rank's steps but the first, in which data workers start."""
        return self._data_seconds / self._seconds if self._seconds else 0.0

    def add(self, record: StepRecord) -> None:
        """Takes a step; passes on those whose times are ready."""
        start = time.perf_counter()
        self._measured.append(record)
        while self._measured and self._measured[0].times.ready:
            self._send(self._measured.popleft())
        while self._sent and (of_ranks := self._sent[0][2].poll()) is not None:
            self._write(self._sent.popleft()[0], of_ranks)
        self._recording_seconds += time.perf_counter() - start

    def finish(self) -> None:
        """Returns once the writers have everything that was added; all ranks call it together."""
        while self._measured:
            self._send(self._measured.popleft())
        while self._sent:
            record, own, gather = self._sent.popleft()
            of_ranks = gather.wait(_PATIENCE_SECONDS)
            self._write(record, own.tobytes() if of_ranks is None else of_ranks)

    def flush(self) -> None:
        """Puts what the writers have on disk; may be called in any thread."""
        for writer in (self._writer, self._own_writer):
            if writer is not None:
                writer.flush()

    def __enter__(self) -> StepRecorder:
        return self

    def __exit__(self, kind: object, fault: BaseException | None, trace: object) -> None:
        if fault is None:
            self.finish()
            return
        for record, own, gather in self._sent:
            of_ranks = None
            with suppress(Exception):  # the fault may be that the ranks have lost each other
                of_ranks = gather.poll()
            self._write(record, of_ranks or own.tobytes())
        for record in self._measured:
            if record.times.ready:
                self._write(record, self._figures(record).tobytes())

    def _send(self, record: StepRecord) -> None:
        own = self._figures(record)
        if self._own_writer is None:
            self._sent.append((record, own, self._control.start_gather(own.tobytes())))
            return
        self._own_writer.append("steps", {"step": record.step, **_columns(own[None])})
        if self._writer is not None:
            self._writer.append("steps", self._of_all(record))

    def _figures(self, record: StepRecord) -> Array:
        """This rank's values of _COLUMNS, float64."""
        seconds = record.times.seconds()
        loss = float(record.loss)
        if not (math.isfinite(loss) or record.skipped or self.fault):
            self.fault = f"{record.step} the loss of step {record.step + 1} is {loss}"
        if self._first_ended:
            self._seconds += sum(seconds.values())
            self._data_seconds += seconds.get("data", 0.0)
        self._first_ended = True
        figures = {
            "rank_loss": loss,
            **record.of_rank,
            **{f"{phase}_seconds": seconds.get(phase, 0.0) for phase in PHASES},
            "step_seconds": sum(seconds.values()),
            "recording_seconds": self._recording_seconds,
        }
        self._recording_seconds = 0.0
        return np.array([figures.get(column, np.nan) for column in _COLUMNS], "<f8")

    def _write(self, record: StepRecord, of_ranks: bytes) -> None:
        if self._writer is None:
            return
        columns = _columns(np.frombuffer(of_ranks, "<f8").reshape(-1, len(_COLUMNS)))
        if "communication_seconds" in columns:
            columns["waiting_seconds"] = waiting(columns["communication_seconds"][None])[0]
        row: dict[str, Any] = {
            **self._of_all(record),
            "loss": float(np.nanmean(columns["rank_loss"])) if "rank_loss" in columns else np.nan,
            "samples": int(columns["rank_samples"].sum()),
            **columns,
        }
        self._writer.append("steps", row)
        if self._on_step is not None:
            self._on_step(row)

    def _of_all(self, record: StepRecord) -> dict[str, float]:
        return {
            "step": record.step,
            "epoch": record.epoch,
            "plan": record.plan - self._first_plan,
            "learning_rate": record.learning_rate,
            "gradient_norm": float(record.gradient_norm),
        }


def on_host(value: float | Tensor) -> float | Tensor:
    """Starts copying the value to the host without waiting: it is there when the step's times are ready."""
    if not isinstance(value, Tensor) or value.device.type != "cuda":
        return value
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value.detach(), non_blocking=True)


def _columns(of_ranks: Array) -> dict[str, Array]:
    """Columns of the results by name, each [rank], from values of _COLUMNS [rank, column]; what no rank measured is
    left out."""
    columns = {}
    for name, values in zip(_COLUMNS, of_ranks.T, strict=True):
        if not np.isnan(values).all():
            kind = RANK_FIELDS[name].kind
            columns[name] = np.nan_to_num(values, nan=-1).astype(kind) if kind.startswith("int") else values
    return columns
