"""Types of the arrays that planners pass on; what an axis is, each docstring says. And their order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Operations = npt.NDArray[np.uint8]
"""Of `Operation` values."""


def places(values: Floats, axis: int = 0) -> Ints:
    """The place of each value along the axis, the largest first, equal ones in their order: int64 [*values.shape]."""
    return np.argsort(np.argsort(-values, axis=axis, kind="stable"), axis=axis, kind="stable")
