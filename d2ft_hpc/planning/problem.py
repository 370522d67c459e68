"""What a planner solves: scores, costs and budgets of every (row, block, head); and the check of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.plan import Operation, SkipPlan

BUDGET_EPSILON = 1e-9
"""A device may exceed a budget by this fraction of its dense cost, so that float error decides nothing."""

Costs = tuple[float, float, float]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PlanProblem:
    """Scores, costs and budgets of one global batch. Arrays are copied and read-only.

    A cell is one (row, block, head). Costs and budgets are in one unit: the cost of a FULL cell is 1 by
    custom, and a device's use is the sum over its cells.

    forward_score, backward_score: float64 [row, block, head], finite and >= 0: what the cell gives when its
        forward runs, and what it gives on top when its backward runs too.
    replicas: data-parallel replicas; row = slot * replicas + replica.
    device: int32 [row, block, head], the device that runs the cell.
    device_names: one for each device, for messages.
    compute_cost, communication_cost: of a cell under SHORTCUT, FORWARD_ONLY and FULL, not decreasing.
    compute_budget, communication_budget: float64 [device]; inf = unlimited.
    always_share: fraction of the dense step's training compute that runs whatever the plan says (embedding,
        classifier). It is in no cost or budget here; messages use it to speak in shares of the whole step.

    Raises PlanError if anything is not as said, or if a budget does not even pay for SHORTCUT everywhere.
    """

    forward_score: Floats
    backward_score: Floats
    replicas: int
    device: npt.NDArray[np.int32]
    device_names: tuple[str, ...]
    compute_cost: Costs
    communication_cost: Costs
    compute_budget: Floats
    communication_budget: Floats
    always_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("forward_score", "backward_score", "compute_budget", "communication_budget"):
            self._freeze(name, np.float64)
        self._freeze("device", np.int32)
        shape = self.forward_score.shape
        if len(shape) != 3 or self.forward_score.size == 0:
            raise PlanError(f"forward_score must be [row, block, head], got the shape {shape}.")
        for name in ("backward_score", "device"):
            if getattr(self, name).shape != shape:
                raise PlanError(f"{name} has the shape {getattr(self, name).shape}, forward_score {shape}.")
        if self.replicas < 1 or shape[0] % self.replicas:
            raise PlanError(f"{shape[0]} rows cannot be divided over {self.replicas} replicas.")
        for name in ("forward_score", "backward_score"):
            _check_score(name, getattr(self, name))
        devices = len(self.device_names)
        if self.device.min() < 0 or self.device.max() >= devices:
            raise PlanError(
                f"Cells lie on devices {self.device.min()} to {self.device.max()}, "
                f"but only 0 to {devices - 1} have a name."
            )
        for resource in ("compute", "communication"):
            costs = tuple(float(cost) for cost in getattr(self, f"{resource}_cost"))
            if len(costs) != 3 or not 0 <= costs[0] <= costs[1] <= costs[2] < math.inf:
                raise PlanError(
                    f"{resource}_cost must be finite, >= 0 and not decreasing from SHORTCUT over "
                    f"FORWARD_ONLY to FULL, got {costs}."
                )
            object.__setattr__(self, f"{resource}_cost", costs)
            self._check_budget(resource, getattr(self, f"{resource}_budget"), costs[Operation.SHORTCUT])
        if not 0 <= self.always_share < 1:
            raise PlanError(f"always_share must be in [0, 1), got {self.always_share}.")

    @classmethod
    def data_parallel(
        cls,
        forward_score: npt.ArrayLike,
        backward_score: npt.ArrayLike,
        *,
        replicas: int,
        compute_budget: float,
        communication_budget: float | None = None,
        forward_cost: float = 1 / 3,
        always_share: float = 0.0,
        device_speed: Sequence[float] | None = None,
    ) -> PlanProblem:
        """The problem of `replicas` devices that each run the whole model on their own rows.

        forward_score, backward_score: [row, block, head].
        compute_budget: fraction in (0, 1] of the dense step's training compute, always-run parts included.
        communication_budget: fraction in (0, 1] of what the dense step's cells send (FULL 1, FORWARD_ONLY
            0.5, SHORTCUT 0: arXiv 2504.12471); None = unlimited.
        forward_cost: cost of FORWARD_ONLY, a fraction in [0, 1] of the cost of FULL.
        always_share: fraction in [0, 1) of the dense compute that runs regardless of the plan; it is paid
            out of `compute_budget` first.
        device_speed: relative speed of each replica's device; None = all equal. The work is shared out so
            that all devices finish together, no device getting more than its dense step.

        Raises PlanError if a value is out of range, or if a device's budget does not reach `always_share`
        (the message names the device, its budget and the least feasible `compute_budget`).
        """
        forward = np.asarray(forward_score, dtype=np.float64)
        if forward.ndim != 3 or forward.size == 0:
            raise PlanError(f"forward_score must be [row, block, head], got the shape {forward.shape}.")
        if replicas < 1 or forward.shape[0] % replicas:
            raise PlanError(f"{forward.shape[0]} rows cannot be divided over {replicas} replicas.")
        for name, value in (
            ("compute_budget", compute_budget),
            ("communication_budget", communication_budget),
        ):
            if value is not None and not 0 < value <= 1:
                raise PlanError(f"{name} is a share of the dense step in (0, 1], got {value}.")
        if not 0 <= forward_cost <= 1:
            raise PlanError(f"forward_cost is a share of the cost of FULL in [0, 1], got {forward_cost}.")
        if not 0 <= always_share < 1:
            raise PlanError(f"always_share must be in [0, 1), got {always_share}.")
        speed = np.asarray([1.0] * replicas if device_speed is None else device_speed, dtype=np.float64)
        if speed.shape != (replicas,) or not (np.isfinite(speed) & (speed > 0)).all():
            raise PlanError(f"device_speed needs {replicas} numbers > 0, got {device_speed}.")

        names = tuple(f"rank {replica}" for replica in range(replicas))
        share = _finish_together(speed, compute_budget)
        slowest = int(share.argmin())
        if share[slowest] < always_share - BUDGET_EPSILON:
            least = float(np.minimum(1.0, always_share * speed / speed[slowest]).mean())
            raise PlanError(
                f"compute_budget {compute_budget:g} gives {names[slowest]} {share[slowest]:.4f} of its dense "
                f"step, but {always_share:.4f} of it runs whatever the plan says (embedding, classifier). "
                f"The least feasible compute_budget is {_round_up(least):g}."
            )
        cells = forward.size // replicas
        cell_budget = np.clip((share - always_share) / (1 - always_share), 0.0, 1.0) * cells
        owner = np.arange(forward.shape[0], dtype=np.int32) % replicas
        return cls(
            forward_score=forward,
            backward_score=np.asarray(backward_score, dtype=np.float64),
            replicas=replicas,
            device=np.broadcast_to(owner[:, None, None], forward.shape),
            device_names=names,
            compute_cost=(0.0, forward_cost, 1.0),
            communication_cost=(0.0, 0.5, 1.0),
            compute_budget=cell_budget,
            communication_budget=np.full(
                replicas, math.inf if communication_budget is None else communication_budget * cells
            ),
            always_share=always_share,
        )

    @property
    def num_devices(self) -> int:
        return len(self.device_names)

    def cells_per_device(self) -> npt.NDArray[np.int64]:
        """Number of cells of each device, int64 [device]."""
        return np.bincount(self.device.ravel(), minlength=self.num_devices).astype(np.int64)

    def gains(self, forward_weight: float = 1.0, backward_weight: float = 1.0) -> tuple[Floats, Floats]:
        """Both scores, each divided by its mean over the problem and weighted: float64 [row, block, head].

        Normalised so that the weights mean the same whatever units the scores have; a score that is zero
        everywhere counts as equal everywhere. Raises PlanError if a weight is not finite or below 0.
        """
        for name, weight in (("forward_weight", forward_weight), ("backward_weight", backward_weight)):
            if not 0 <= weight < math.inf:
                raise PlanError(f"{name} must be a finite number >= 0, got {weight}.")
        return (
            forward_weight * _divide_by_mean(self.forward_score),
            backward_weight * _divide_by_mean(self.backward_score),
        )

    def objective(
        self,
        operations: npt.NDArray[np.uint8],
        forward_weight: float = 1.0,
        backward_weight: float = 1.0,
    ) -> float:
        """Sum of the forward gains of all cells that run, plus the backward gains of the FULL ones."""
        forward_gain, backward_gain = self.gains(forward_weight, backward_weight)
        return float(
            forward_gain[operations >= Operation.FORWARD_ONLY].sum()
            + backward_gain[operations == Operation.FULL].sum()
        )

    def used_compute(self, plan: SkipPlan) -> Floats:
        """Compute that each device's cells use, float64 [device]."""
        return self._used(plan, self.compute_cost)

    def used_communication(self, plan: SkipPlan) -> Floats:
        """Communication that each device's cells use, float64 [device]."""
        return self._used(plan, self.communication_cost)

    def budgets(self, tolerance: float = BUDGET_EPSILON / 2) -> Floats:
        """float64 [device, 2] (compute, communication) with `tolerance` times the dense cost on top.

        Planners plan within half of the tolerance that `check` grants: their sums may round differently.
        """
        cells = self.cells_per_device()
        return np.stack(
            [
                self.compute_budget + tolerance * cells * self.compute_cost[Operation.FULL],
                self.communication_budget + tolerance * cells * self.communication_cost[Operation.FULL],
            ],
            axis=1,
        )

    def _used(self, plan: SkipPlan, cost: Costs) -> Floats:
        self.require_shape(plan)
        keys = self.device.astype(np.int64) * len(Operation) + plan.operations
        counts = np.bincount(keys.ravel(), minlength=self.num_devices * len(Operation))
        return np.asarray(counts.reshape(self.num_devices, len(Operation)) @ np.asarray(cost))

    def require_shape(self, plan: SkipPlan) -> None:
        """Raise PlanError if the plan is not of this problem's shape."""
        if (plan.operations.shape, plan.replicas) != (self.forward_score.shape, self.replicas):
            raise PlanError(
                f"The plan has the shape {plan.operations.shape} with {plan.replicas} replicas, "
                f"the problem {self.forward_score.shape} with {self.replicas}."
            )

    def _freeze(self, name: str, dtype: type) -> None:
        array: npt.NDArray[Any] = np.array(getattr(self, name), dtype=dtype)
        array.setflags(write=False)
        object.__setattr__(self, name, array)

    def _check_budget(self, resource: str, budget: Floats, shortcut_cost: float) -> None:
        if budget.shape != (self.num_devices,):
            raise PlanError(f"{resource}_budget needs {self.num_devices} numbers, got shape {budget.shape}.")
        least = shortcut_cost * self.cells_per_device()
        for index in np.flatnonzero(~(budget >= least * (1 - BUDGET_EPSILON))):
            raise PlanError(
                f"The {resource} budget of {self.device_names[index]} is {budget[index]:g}; "
                f"the least feasible one is {least[index]:g} (every head SHORTCUT)."
            )


def check(plan: SkipPlan, problem: PlanProblem) -> None:
    """Raise PlanError, naming device, use and budget, if the plan exceeds a budget or has another shape."""
    problem.require_shape(plan)
    allowed = problem.budgets(BUDGET_EPSILON)
    for column, resource, used in (
        (0, "compute", problem.used_compute(plan)),
        (1, "communication", problem.used_communication(plan)),
    ):
        for index in np.flatnonzero(used > allowed[:, column]):
            raise PlanError(
                f"The {plan.planner} plan exceeds the {resource} budget of {problem.device_names[index]}: "
                f"it uses {used[index]:g}, allowed are {allowed[index, column]:g}. "
                f"Raise the {resource} budget or choose another planner."
            )


def _check_score(name: str, score: Floats) -> None:
    wrong = np.argwhere(~(np.isfinite(score) & (score >= 0)))
    if len(wrong):
        row, block, head = (int(index) for index in wrong[0])
        raise PlanError(
            f"{name} is {score[row, block, head]} at row {row}, block {block}, head {head} "
            f"({len(wrong)} of {score.size} values are unusable); scores must be finite and >= 0."
        )


def _divide_by_mean(score: Floats) -> Floats:
    largest = score.max()
    if largest == 0:
        return np.ones_like(score)
    scaled = score / largest  # first, since the sum of large scores could overflow
    return np.asarray(scaled / scaled.mean(), dtype=np.float64)


def _finish_together(speed: Floats, mean_share: float) -> Floats:
    """Each device's share of its dense step: min(1, speed * time) with the time that gives the mean."""
    share = np.ones_like(speed)
    open_ = np.ones(len(speed), dtype=bool)  # devices that the budget does not let run densely
    while open_.any():
        time = (mean_share * len(speed) - np.count_nonzero(~open_)) / speed[open_].sum()
        dense = open_ & (speed * time >= 1)
        if not dense.any():
            share[open_] = speed[open_] * time
            break
        open_ &= ~dense
    return share


def _round_up(value: float) -> float:
    """To four digits, upwards, so that a message's number can be typed in and works."""
    return math.ceil(value * 1e4 - 1e-6) / 1e4
