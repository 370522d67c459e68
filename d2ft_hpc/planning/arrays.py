"""Types of the arrays that planners pass on; what an axis is, each docstring says."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Operations = npt.NDArray[np.uint8]
"""Of `Operation` values."""
