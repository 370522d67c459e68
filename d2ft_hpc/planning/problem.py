"""What a planner solves: scores, costs and budgets of every (row, block, head); and the check of a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.arrays import Floats, Ints, Operations
from d2ft_hpc.planning.communication_volume import TokenLayout, active_and_full_ranks, shares_of_senders
from d2ft_hpc.planning.plan import Operation, SkipPlan

BUDGET_EPSILON = 1e-9
"""A device may exceed a budget by this fraction of its dense cost, so that float error decides nothing."""

_FASTEST = 1e50
"""The largest speed of a device. Squares of quotients of such speeds are still finite."""

Costs = tuple[float, float, float]

_BY_DEVICE = ("device_speed", "compute_budget", "communication_budget", "memory_budget")


@dataclass(frozen=True, eq=False)
class PlanProblem:
    """Scores, costs and budgets of one global batch. Arrays are copied and read-only.

    A cell is one (row, block, head). Every cell runs on one device: a device is one tensor-parallel rank of
    one pipeline stage of one data-parallel replica, numbered (replica * stages + stage) * ranks + rank.
    Costs and budgets are in one unit: the cost of a FULL cell is 1 by custom, and a device's use is the sum
    over its cells.

    forward_score, backward_score: float64 [row, block, head], finite and >= 0: what the cell gives when its
        forward runs, and what it gives on top when its backward runs too.
    replicas: data-parallel replicas; row = slot * replicas + replica.
    rank: int64 [block, head], the owner map: the tensor-parallel rank that holds the head.
    stage: int64 [block], the pipeline stage that holds the block.
    device_speed: float64 [device], 1e-50 to 1e50: cost that the device gets done in a unit of time.
    compute_cost, communication_cost: of a cell under SHORTCUT, FORWARD_ONLY and FULL, not decreasing.
    meeting_cost: what every rank of a stage sends, on average, for a (row, block) forward and backward if all of them
        have a head that runs, or is FULL: the engine's own messages. If only some have, it is the share given by
        `communication_volume.shares_of_senders` for `token_layout`. It adds to `communication_cost`.
    compute_budget, communication_budget: float64 [device]; inf = unlimited.
    memory_budget: float64 [device], most FULL cells of one row (their activations wait for the backward);
        inf = unlimited.
    always_share: fraction of the dense step's training compute that runs whatever the plan says (embedding,
        classifier). It is in no cost or budget here; messages use it to speak in shares of the whole step.
    replicas_meet: replicas wait for each other in every block of every row, as in ZeRO 3 and FSDP2, which gather each
        block's weights; if not, at the end of the step only.

    Raises PlanError if anything is not as said, or if a budget does not even pay for SHORTCUT everywhere.
    """

    forward_score: Floats
    backward_score: Floats
    replicas: int
    rank: Ints
    stage: Ints
    device_speed: Floats
    compute_cost: Costs
    communication_cost: Costs
    compute_budget: Floats
    communication_budget: Floats
    memory_budget: Floats
    always_share: float = 0.0
    meeting_cost: tuple[float, float] = (0.0, 0.0)
    replicas_meet: bool = False
    token_layout: TokenLayout = "replicated"

    def __post_init__(self) -> None:
        for name in ("forward_score", "backward_score", *_BY_DEVICE):
            self._freeze(name, np.float64)
        for name in ("rank", "stage"):
            self._freeze(name, np.int64)
        shape = self.forward_score.shape
        if len(shape) != 3 or self.forward_score.size == 0:
            raise PlanError(f"forward_score must be [row, block, head], got the shape {shape}.")
        for name, its_shape in (("backward_score", shape), ("rank", shape[1:]), ("stage", shape[1:2])):
            if getattr(self, name).shape != its_shape:
                raise PlanError(f"{name} has the shape {getattr(self, name).shape}, forward_score {shape}.")
        if self.replicas < 1 or shape[0] % self.replicas:
            raise PlanError(f"{shape[0]} rows cannot be divided over {self.replicas} replicas.")
        for name in ("forward_score", "backward_score"):
            _check_score(name, getattr(self, name))
        speed, replica_stages = self.device_speed, self.replicas * self.stages
        if self.stage.min() < 0 or speed.ndim != 1 or not len(speed) or len(speed) % replica_stages:
            raise PlanError(
                f"device_speed needs a number for every rank of {self.replicas} replicas x {self.stages} "
                f"stages, got the shape {speed.shape}."
            )
        if not ((speed >= 1 / _FASTEST) & (speed <= _FASTEST)).all():
            raise PlanError(
                f"device_speed must be from {1 / _FASTEST:g} to {_FASTEST:g}, got {speed.tolist()}."
            )
        if self.rank.min() < 0 or self.rank.max() >= self.ranks:
            raise PlanError(
                f"Heads lie on ranks {self.rank.min()} to {self.rank.max()}, "
                f"but device_speed knows only ranks 0 to {self.ranks - 1}."
            )
        for resource in ("compute", "communication"):
            costs = getattr(self, f"{resource}_cost")
            if not 0 <= costs[0] <= costs[1] <= costs[2] < math.inf:
                raise PlanError(
                    f"{resource}_cost must be finite, >= 0 and not decreasing from SHORTCUT over "
                    f"FORWARD_ONLY to FULL, got {costs}."
                )
            # Integers, too, are floats from here on, whatever planners compute with them.
            object.__setattr__(self, f"{resource}_cost", tuple(map(float, costs)))
            self._check_budget(resource, getattr(self, f"{resource}_budget"), costs[Operation.SHORTCUT])
        self._check_budget("memory", self.memory_budget, 0.0)
        if not 0 <= self.always_share < 1:
            raise PlanError(f"always_share must be in [0, 1), got {self.always_share}.")

    def of_followed(self, followed: Ints) -> PlanProblem:
        """The problem of the replicas whose rows others follow, by the mean scores of all that do. Devices keep budgets
        and names.

        followed: int64 [replica], the replica whose rows each one follows.
        """
        leaders, leader, followers = np.unique(followed, return_inverse=True, return_counts=True)
        if len(leaders) == self.replicas:
            return self
        order = np.argsort(leader.ravel(), kind="stable")
        first = np.cumsum(followers) - followers

        def mean(score: Floats) -> Floats:
            of_replicas = score.reshape(-1, self.replicas, *score.shape[1:])[:, order]
            total = np.add.reduceat(of_replicas, first, axis=1)
            return np.asarray((total / followers[:, None, None]).reshape(-1, *score.shape[1:]))

        of_replica = self.num_devices // self.replicas
        devices = (leaders[:, None] * of_replica + np.arange(of_replica)).ravel()
        problem = replace(
            self,
            forward_score=mean(self.forward_score),
            backward_score=mean(self.backward_score),
            replicas=len(leaders),
            **{name: getattr(self, name)[devices] for name in _BY_DEVICE},
        )
        problem.__dict__["device_names"] = tuple(self.device_names[device] for device in devices)
        return problem

    @property
    def num_devices(self) -> int:
        return len(self.device_speed)

    @property
    def stages(self) -> int:
        """Number of pipeline stages."""
        return int(self.stage.max()) + 1

    @property
    def ranks(self) -> int:
        """Number of tensor-parallel ranks of each stage."""
        return self.num_devices // (self.replicas * self.stages)

    @property
    def slots(self) -> int:
        """Rows of one replica."""
        return len(self.forward_score) // self.replicas

    @property
    def replica_stage(self) -> Ints:
        """The stage that runs each block of each row, counted through all replicas: int64 [row, block]."""
        replica = np.arange(len(self.forward_score)) % self.replicas
        return replica[:, None] * self.stages + self.stage

    @cached_property
    def device(self) -> Ints:
        """The device that runs each cell, int64 [row, block, head]."""
        return self.replica_stage[:, :, None] * self.ranks + self.rank

    @cached_property
    def device_names(self) -> tuple[str, ...]:
        """A device's name in messages, without parts that there is one of only: "rank 3", "stage 1, rank 3", "replica
        0, stage 1"."""
        sizes = {"replica": self.replicas, "stage": self.stages, "rank": self.ranks}
        several = [kind for kind, size in sizes.items() if size > 1]
        if several in ([], ["replica"]):
            return tuple(f"rank {device}" for device in range(self.num_devices))
        names = []
        for places in np.ndindex(*sizes.values()):
            place = dict(zip(sizes, places, strict=True))
            names.append(", ".join(f"{kind} {place[kind]}" for kind in several))
        return tuple(names)

    @cached_property
    def cells_per_device(self) -> Ints:
        """Number of cells of each device, int64 [device]."""
        device_of_replica = self.stage[:, None] * self.ranks + self.rank
        heads = np.bincount(device_of_replica.ravel(), minlength=self.stages * self.ranks)
        return np.tile(heads * self.slots, self.replicas)

    def gains(self) -> tuple[Floats, Floats]:
        """Both scores, each divided by its mean over the problem: float64 [row, block, head].

        Normalised so that both count equally whatever units the scores have; a score that is zero everywhere counts
        as equal everywhere.
        """
        return _divide_by_mean(self.forward_score), _divide_by_mean(self.backward_score)

    def objective(self, operations: Operations) -> float:
        """Sum of the forward gains of all cells that run, plus the backward gains of the FULL ones."""
        forward_gain, backward_gain = self.gains()
        return float(
            forward_gain[operations >= Operation.FORWARD_ONLY].sum()
            + backward_gain[operations == Operation.FULL].sum()
        )

    def used_compute(self, plan: SkipPlan) -> Floats:
        """Compute that each device's cells use, float64 [device]."""
        return self._used(plan, self.compute_cost)

    def used_communication(self, plan: SkipPlan) -> Floats:
        """Communication that each device's cells and meetings use, float64 [device]."""
        return self._used(plan, self.communication_cost) + self._meetings(plan)

    def dense_communication(self) -> Floats:
        """Communication of the dense step, float64 [device]."""
        blocks = np.bincount(self.stage, minlength=self.stages)
        meetings = blocks * self.slots * sum(self.meeting_cost)
        cells = self.cells_per_device * self.communication_cost[Operation.FULL]
        return np.asarray(cells + np.tile(np.repeat(meetings, self.ranks), self.replicas))

    def least_budget(self, resource: str, device: int, use: float) -> str:
        """The least budget ("compute" or "communication") that allows a device's cells this use, in units of its dense
        step, as a number for messages."""
        if resource == "communication":
            return f"{round_up(use / self.dense_communication()[device]):g}"
        dense = self.cells_per_device[device] * self.compute_cost[Operation.FULL]
        return f"{round_up(self.always_share + (1 - self.always_share) * use / dense):g}"

    def used_memory(self, plan: SkipPlan) -> Floats:
        """The most FULL cells that each device has in one row, float64 [device]."""
        self.require_shape(plan)
        rows = np.arange(plan.num_rows)[:, None, None]
        keys = (rows * self.num_devices + self.device)[plan.operations == Operation.FULL]
        counts = np.bincount(keys, minlength=plan.num_rows * self.num_devices)
        return np.asarray(counts.reshape(plan.num_rows, -1).max(axis=0), dtype=np.float64)

    @cached_property
    def budgets_to_plan(self) -> Floats:
        """`budgets` within half of the tolerance that `check` grants: planners' sums may round differently."""
        return self.budgets(BUDGET_EPSILON / 2)

    def budgets(self, tolerance: float) -> Floats:
        """float64 [device, 2] (compute, communication) with `tolerance` times the dense cost on top."""
        cells = self.cells_per_device
        return np.stack(
            [
                self.compute_budget + tolerance * cells * self.compute_cost[Operation.FULL],
                self.communication_budget + tolerance * self.dense_communication(),
            ],
            axis=1,
        )

    def _used(self, plan: SkipPlan, cost: Costs) -> Floats:
        self.require_shape(plan)
        keys = self.device * len(Operation) + plan.operations
        counts = np.bincount(keys.ravel(), minlength=self.num_devices * len(Operation))
        return np.asarray(counts.reshape(self.num_devices, len(Operation)) @ np.asarray(cost))

    def _meetings(self, plan: SkipPlan) -> Floats:
        """What the meetings of every device's stage send, float64 [device]."""
        shares = shares_of_senders(self.token_layout, self.ranks)
        active, full = active_and_full_ranks(plan.operations, self.rank, self.ranks)
        forward, backward = self.meeting_cost
        cost = forward * shares[active, active] + backward * shares[active, full]
        sent = np.bincount(self.replica_stage.ravel(), np.ravel(cost), self.replicas * self.stages)
        return np.asarray(np.repeat(sent, self.ranks))

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
        least = shortcut_cost * self.cells_per_device
        for index in np.flatnonzero(~(budget >= least * (1 - BUDGET_EPSILON))):
            raise PlanError(
                f"The {resource} budget of {self.device_names[index]} is {budget[index]:g}; "
                f"the least feasible one is {least[index]:g} (every head SHORTCUT)."
            )


def check(plan: SkipPlan, problem: PlanProblem) -> None:
    """Raise PlanError, naming device, use and budget, if the plan exceeds a budget or has another shape."""
    problem.require_shape(plan)
    allowed = problem.budgets(BUDGET_EPSILON)
    for resource, used, budget in (
        ("compute", problem.used_compute(plan), allowed[:, 0]),
        ("communication", problem.used_communication(plan), allowed[:, 1]),
        ("memory", problem.used_memory(plan), problem.memory_budget),
    ):
        for index in np.flatnonzero(used > budget):
            raise PlanError(
                f"The {plan.planner} plan exceeds the {resource} budget of {problem.device_names[index]}: "
                f"it uses {used[index]:g}, allowed are {budget[index]:g}. "
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


def round_up(value: float) -> float:
    """To four digits, upwards, so that a message's number can be typed in and works."""
    return math.ceil(value * 1e4 - 1e-6) / 1e4
