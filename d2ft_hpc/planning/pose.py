"""The one place that poses problems: scores, costs and budgets, as planners solve them for a layout of devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.arrays import Floats, Ints
from d2ft_hpc.planning.communication_volume import TokenLayout
from d2ft_hpc.planning.problem import BUDGET_EPSILON, PlanProblem, round_up


class CostShares(Protocol):
    """What a model costs, as counted, measured or recorded."""

    @property
    def forward_share(self) -> float:
        """Cost of FORWARD_ONLY in units of FULL, in [0, 1]."""

    @property
    def always_share(self) -> float:
        """Share in [0, 1) of the dense step that runs whatever a plan says; the compute budget pays it first."""


@dataclass(frozen=True)
class GivenShares:
    """Costs that are just stated."""

    forward_share: float = 1 / 3
    always_share: float = 0.0


@dataclass(frozen=True)
class Budgets:
    """What a plan may use, each a share in (0, 1] of what the dense step does; None = unlimited.

    compute: of its training compute, always-run parts included. communication: of what it sends. memory: of the
    activations that a device keeps for the backward of one row.

    Raises PlanError if one is out of range.
    """

    compute: float
    communication: float | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 < value <= 1:
                raise PlanError(f"{name}_budget is a share of the dense step in (0, 1], got {value}.")


@dataclass(frozen=True, eq=False)
class Devices:
    """Data-parallel replicas, each cut into pipeline stages and tensor-parallel ranks, and what their devices can do.

    rank: int [block, head], owner map of the tensor-parallel ranks; None = one rank.
    stage: int [block], pipeline stage of each block; None = one stage.
    speed: relative speed of each device; None = all equal. The work is shared out so that all devices finish together,
        no device getting more than its dense step.
    most_full: the most FULL cells of one row that each device's memory has room for, beside the memory budget; None =
        any number.
    replicas_meet: as `PlanProblem` says.
    """

    replicas: int = 1
    rank: npt.ArrayLike | None = None
    stage: npt.ArrayLike | None = None
    speed: Sequence[float] | None = None
    most_full: Sequence[float] | None = None
    replicas_meet: bool = False


def pose(
    scores: npt.ArrayLike,
    costs: CostShares,
    budgets: Budgets,
    devices: Devices | None = None,
    messages: TokenLayout | None = None,
) -> PlanProblem:
    """The problem of scores [2, row, block, head], forward and backward.

    devices: None = one. messages: what counts as sent. None = each cell by itself, FULL 1, FORWARD_ONLY 0.5 and
        SHORTCUT 0 (arXiv 2504.12471); else what tensor-parallel ranks really send in that layout of tokens: for a
        (row, block) half forward, half backward, less where not all ranks have a head that runs, or is FULL.

    Raises PlanError if a value is out of range, or if a device's budget does not reach `costs.always_share` (the
    message names the device, its budget and the least feasible compute budget).
    """
    forward, backward = np.asarray(scores, dtype=np.float64)
    devices = devices or Devices()
    replicas, always_share = devices.replicas, costs.always_share
    if not 0 <= costs.forward_share <= 1:
        raise PlanError(f"forward_share is a share of the cost of FULL in [0, 1], got {costs.forward_share}.")
    rank = np.zeros(forward.shape[1:]) if devices.rank is None else np.asarray(devices.rank)
    stage = np.zeros(forward.shape[1:2]) if devices.stage is None else np.asarray(devices.stage)
    number = replicas * (int(np.max(stage, initial=0)) + 1) * (int(np.max(rank, initial=0)) + 1)
    speed = np.asarray([1.0] * number if devices.speed is None else devices.speed, dtype=np.float64)
    if speed.shape != (number,):
        raise PlanError(f"device_speed needs {number} numbers > 0, got {devices.speed}.")
    unlimited: Floats = np.full(number, math.inf)
    problem = PlanProblem(
        forward_score=forward,
        backward_score=backward,
        replicas=replicas,
        rank=rank.astype(np.int64),
        stage=stage.astype(np.int64),
        device_speed=speed,
        compute_cost=(0.0, costs.forward_share, 1.0),
        communication_cost=(0.0, 0.5, 1.0) if messages is None else (0.0, 0.0, 0.0),
        meeting_cost=(0.0, 0.0) if messages is None else (0.5, 0.5),
        replicas_meet=devices.replicas_meet,
        token_layout=messages or "replicated",
        compute_budget=unlimited,
        communication_budget=unlimited,
        memory_budget=unlimited,
        always_share=always_share,
    )
    cells = problem.cells_per_device
    share = finish_together(speed, cells, budgets.compute)
    slowest = int(share.argmin())
    if share[slowest] < always_share - BUDGET_EPSILON:
        time = always_share * cells[slowest] / speed[slowest]
        least = float(np.minimum(cells, time * speed).sum() / cells.sum())
        raise PlanError(
            f"compute_budget {budgets.compute:g} gives {problem.device_names[slowest]} "
            f"{share[slowest]:.4f} of its dense step, but {always_share:.4f} of it runs whatever the "
            f"plan says (embedding, classifier). The least feasible compute_budget is {round_up(least):g}."
        )
    cells_of_row = cells / problem.slots
    memory = unlimited if budgets.memory is None else np.floor(budgets.memory * cells_of_row + 1e-9)
    if devices.most_full is not None:
        memory = np.minimum(memory, np.asarray(devices.most_full, dtype=np.float64))
    sent = (
        unlimited if budgets.communication is None else budgets.communication * problem.dense_communication()
    )
    return replace(
        problem,
        compute_budget=np.clip((share - always_share) / (1 - always_share), 0.0, 1.0) * cells,
        communication_budget=sent,
        memory_budget=memory,
    )


def finish_together(speed: Floats, cells: Ints, mean_share: float) -> Floats:
    """Each device's share of its dense step, float64 [device], at most 1: what it finishes in a time that is the same
    for all. In that time `mean_share` of all cells are done. speed, cells: [device].
    """
    share = np.ones(len(speed))
    open_ = cells > 0  # devices that the budget does not let run densely
    while open_.any():
        time = (mean_share * cells.sum() - cells[~open_].sum()) / speed[open_].sum()
        dense = open_ & (speed * time >= cells)
        if not dense.any():
            share[open_] = speed[open_] * time / cells[open_]
            break
        open_ &= ~dense
    return share
