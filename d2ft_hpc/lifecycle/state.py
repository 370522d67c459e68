"""What a loop's plans need to go on exactly: the plan in force, and what the next ones follow from."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from d2ft_hpc.errors import CheckpointError
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.scores import Scores

FILE = "d2ft.npz"
"""In a checkpoint folder."""


@dataclass(frozen=True)
class PlanState:
    """plan: in force; None: steps are dense. batches: begun since the plan, or since scores are measured. plans_made:
    so far. scores: of the plan. observed: sums over the batches that scores are being taken from, float32 [rank,
    slot, block, head]; None: no batches are being observed. compute: what a rank computed so far, as numbers of the
    loop's own. settings: that the plans were made by, as a loop keeps them."""

    plan: SkipPlan | None = None
    batches: int = 0
    plans_made: int = 0
    scores: Scores | None = None
    observed: npt.NDArray[np.float32] | None = None
    compute: Sequence[float] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """An .npz file without pickles."""
        counts = {"batches": self.batches, "plans_made": self.plans_made, "compute": list(self.compute)}
        names = [] if self.scores is None else [self.scores.forward_name, self.scores.backward_name]
        arrays: dict[str, npt.NDArray[Any]] = {
            "state": _as_array(
                json.dumps({**counts, "scores": names, "settings": dict(self.settings)}).encode()
            )
        }
        if self.plan is not None:
            arrays["plan"] = _as_array(self.plan.to_bytes())
        if self.scores is not None:
            arrays |= {"forward": self.scores.forward, "backward": self.scores.backward}
        if self.observed is not None:
            arrays["observed"] = self.observed
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **arrays)
        return file.getvalue()

    @staticmethod
    def from_bytes(content: bytes, where: str) -> PlanState:
        """What `to_bytes` made. Raises CheckpointError, which names `where` it is from, if it is damaged."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                state = json.loads(arrays["state"].tobytes())
                return PlanState(
                    SkipPlan.from_bytes(arrays["plan"].tobytes()) if "plan" in arrays else None,
                    int(state["batches"]),
                    int(state["plans_made"]),
                    Scores(arrays["forward"], arrays["backward"], 0.0, *state["scores"])
                    if state["scores"]
                    else None,
                    arrays.get("observed"),
                    [float(number) for number in state.get("compute", ())],
                    dict(state.get("settings", {})),
                )
        except Exception as error:
            raise CheckpointError(f"{where}: damaged ({error}); load another checkpoint") from error


def _as_array(content: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(content, np.uint8)
