"""From each rank's own scores to those of all rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from d2ft_hpc.launch import Control
from d2ft_hpc.parallel.rank_layout import RankLayout


def gather_scores(control: Control, layout: RankLayout, own: Tensor, *, speaks: bool = True) -> np.ndarray:
    """float32 [row, block, head] of all replicas, whose ranks' scores add up; on all ranks together.

    own: this rank's scores [slot, block, head], zero where other ranks hold the subnets. speaks: whether they count.
    """
    of_slots = own.cpu().numpy().astype("<f4")
    of_replicas: np.ndarray = np.zeros((layout.replicas, *of_slots.shape), "<f4")
    for rank, part in enumerate(control.all_gather(of_slots.tobytes() if speaks else b"")):
        if part:
            replica = replace(layout, rank=rank).replica
            of_replicas[replica] += np.frombuffer(part, "<f4").reshape(of_slots.shape)
    rows: np.ndarray = of_replicas.swapaxes(0, 1).reshape(-1, *of_slots.shape[1:])
    return rows
