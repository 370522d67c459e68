"""Where the time of each training step goes, by phase, on this rank.

A phase's time excludes the phases inside it, so that all phases together are the step. On a GPU the marks are CUDA
events on the stream of the step: nothing waits for the device, and the times are known some steps later.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

OTHER = "other"
COMMUNICATION = "communication"
# Every message from Python, DeepSpeed's too, is sent by one of these methods and waited for by Work.wait.
_SENDING = (
    *("allreduce", "allreduce_coalesced", "allgather", "allgather_coalesced", "_allgather_base"),
    *("allgather_into_tensor_coalesced", "all_gather_single", "gather", "scatter", "broadcast", "reduce"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "reduce_scatter_single"),
    *("alltoall", "alltoall_base", "all_to_all_single", "send", "recv", "recv_anysource", "barrier"),
)


class StepTimes:
    """The times of one step. They are there once `ready`."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._marks: list[tuple[str, Any]] = []
        self._open = [OTHER]
        self._mark()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside belongs to the phase, except the phases inside it."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def turn_to(self, name: str) -> None:
        """Everything from here on belongs to the phase; for users' loops, which we cannot put into a `with`."""
        self._open[-1] = name
        self._mark()

    def end(self) -> None:
        """The step ends here."""
        self._mark()

    @property
    def ready(self) -> bool:
        """Whether the device has passed the end of the step."""
        return self._stream is None or bool(self._marks[-1][1].query())

    def wait(self) -> None:
        """Waits until `ready`: then everything that the step copies to the host has arrived."""
        if self._stream is not None:
            self._marks[-1][1].synchronize()

    def seconds(self) -> dict[str, float]:
        """Seconds by phase; waits for the device if not `ready`."""
        self.wait()
        sums: dict[str, float] = {}
        for (phase, start), (_, stop) in zip(self._marks, self._marks[1:], strict=False):
            passed = stop - start if self._stream is None else start.elapsed_time(stop) / 1e3
            sums[phase] = sums.get(phase, 0.0) + passed
        return sums

    def _mark(self) -> None:
        if self._stream is None:
            self._marks.append((self._open[-1], time.perf_counter()))
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record(self._stream)
            self._marks.append((self._open[-1], event))


_current: StepTimes | None = None


@contextmanager
def timed_step(device: torch.device) -> Iterator[StepTimes]:
    """Times one step: `phase` and all communication from Python inside count towards it."""
    global _current
    _watch_communication()
    times = StepTimes(device)
    _current = times
    try:
        yield times
    finally:
        _current = None
        times.end()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A phase of the step that is being timed; does nothing outside a timed step."""
    if _current is None:
        yield
        return
    with _current.phase(name):
        yield


@functools.cache
def _watch_communication() -> None:
    """Make torch.distributed's own methods phases; what DDP's C++ reducer sends is not seen."""
    from torch import distributed

    if not distributed.is_available():
        return
    for owner, names in ((distributed.ProcessGroup, _SENDING), (distributed.Work, ("wait",))):
        for name in names:
            if hasattr(owner, name):
                setattr(owner, name, _as_communication(getattr(owner, name)))


def _as_communication(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def timed(*args: Any, **kwargs: Any) -> Any:
        if _current is None:
            return method(*args, **kwargs)
        with _current.phase(COMMUNICATION):
            return method(*args, **kwargs)

    return timed
