"""Measured scores of a plan's rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Scores:
    """Contribution scores, float32 [row, block, head]; row = slot * replicas + replica."""

    forward: npt.NDArray[np.float32]
    backward: npt.NDArray[np.float32]
    seconds: float
    """Time that measuring them took, charged to the run."""
    forward_name: str = ""
    backward_name: str = ""
    flops: float = 0.0
    """What measuring them computed, over all ranks."""
