"""Compares the step times of contenders that take turns.

Steps of what is compared alternate in one process on the same ranks, so that a busy machine slows both alike. A step
takes as long as on its slowest rank. Ratios are medians over rounds of neighbouring steps, with a 95 % bootstrap
interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import bootstrap

from d2ft_hpc.errors import ConfigError
from d2ft_hpc.launch import Control
from d2ft_hpc.launch.control import SoloControl

WARM_UP = 3
"""Rounds before those that are measured."""


def alternate(
    steps: Mapping[str, Callable[[], object]],
    count: int,
    device: torch.device,
    control: Control | None = None,
    before: Callable[[str], object] = lambda name: None,
    warm_up: int = WARM_UP,
) -> dict[str, np.ndarray]:
    """Seconds of `count` steps of each by name on the slowest rank, float64 [step]. The order is reversed from round
    to round, and every two rounds it begins with the next contender, so that each is early as often as late.

    control: of the ranks that begin each step together; None: there is one rank. before: is called before the clock
    starts. warm_up: rounds before those that are measured. Raises ConfigError for less than 2 steps.
    """
    if count < 2:
        raise ConfigError(
            f"{count} measured steps of each have no interval: measure at least 2, or better 20"
        )
    control = control or SoloControl()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(warm_up + count):
        first = turn // 2 % len(names)
        for name in (names[first:] + names[:first])[:: -1 if turn % 2 else 1]:
            before(name)
            _synchronize(device)
            control.barrier(60)
            start = time.perf_counter()
            steps[name]()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    own = np.array([of_name[warm_up:] for of_name in seconds.values()])
    of_ranks = [np.frombuffer(part).reshape(own.shape) for part in control.all_gather(own.tobytes())]
    return dict(zip(names, np.max(of_ranks, axis=0), strict=True))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Ratio:
    """A ratio of step times. The interval holds the true median with 95 % confidence."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(seconds: np.ndarray, baseline: np.ndarray) -> Ratio:
        """seconds, baseline: float64 [step], measured in turns."""
        ratios = seconds / baseline
        found = bootstrap((ratios,), np.median, confidence_level=0.95, method="percentile", rng=0)
        interval = found.confidence_interval
        return Ratio(float(np.median(ratios)), float(interval.low), float(interval.high))

    def __str__(self) -> str:
        return f"{self.median:.4f} (95 %: {self.low:.4f} to {self.high:.4f})"
