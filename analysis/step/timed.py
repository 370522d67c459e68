"""Time of a function's kernels on a GPU, without their launches."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch

IN_GRAPH = 10


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median over `repeats` replays of a CUDA graph that runs `function` ten times."""
    for _ in range(3):
        function()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_GRAPH):
            function()
    graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / IN_GRAPH)
    return median(times)
