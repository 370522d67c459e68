"""A computation on tensors as CUDA graphs: hundreds of kernels launched as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_WARM_UPS = 3
"""Runs before a capture: kernels compile, choose algorithms and allocate their workspaces."""


Result = TypeVar("Result")


@dataclass(frozen=True)
class _Capture(Generic[Result]):
    graph: torch.cuda.CUDAGraph
    arguments: tuple[Tensor, ...]
    result: Result


_MOST_GRAPHS = 8


class CudaGraphs(Generic[Result]):
    """Runs one computation through a CUDA graph for each of the first 8 sets of shapes and types of its arguments.

    changed: what the computation writes beside its result; warming up and capturing leave it as it was.

    A result lies in memory that the next call with the same shapes overwrites. While a dispatch mode is on, such as
    one that counts operators, the function runs without a graph, since no mode sees into one.
    """

    def __init__(self, changed: Callable[[], Sequence[Tensor]] = lambda: ()) -> None:
        self._changed = changed
        self._captures: dict[tuple[object, ...], _Capture[Result]] = {}

    def __call__(self, function: Callable[..., Result], *arguments: Tensor) -> Result:
        """What `function` returns, computed by it or by an earlier one that was given with such arguments.

        function: takes tensors on one GPU, returns tensors; it must not synchronise the device, and what it reads and
            writes beside its arguments (parameters, gradients) must stay where it is in memory.
        """
        if _get_current_dispatch_mode() is not None:
            return function(*arguments)
        key = tuple((argument.shape, argument.dtype) for argument in arguments)
        if key not in self._captures:
            if len(self._captures) == _MOST_GRAPHS:
                return function(*arguments)
            self._captures[key] = self._capture(function, arguments)
        capture = self._captures[key]
        for place, argument in zip(capture.arguments, arguments, strict=True):
            place.copy_(argument)
        capture.graph.replay()
        return capture.result

    def _capture(self, function: Callable[..., Result], given: tuple[Tensor, ...]) -> _Capture[Result]:
        arguments = tuple(argument.clone() for argument in given)
        before = [tensor.clone() for tensor in self._changed()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins batches, go on using the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function(*arguments)
        with torch.no_grad():
            for tensor, value in zip(self._changed(), before, strict=True):
                tensor.copy_(value)
        return _Capture(graph, arguments, result)
