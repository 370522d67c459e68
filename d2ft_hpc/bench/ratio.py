"""Step times of contenders that took turns, compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap


@dataclass(frozen=True)
class Ratio:
    """Of step times; the interval holds the true median with 95 % confidence."""

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
