"""The ranks of one pipeline stage that wait for each other in every block, as planning in lock step sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.arrays import Floats, Ints, Operations
from d2ft_hpc.planning.communication_volume import shares_of_senders
from d2ft_hpc.planning.knapsack import largest_use
from d2ft_hpc.planning.levels import Levels, estimate_levels, make_levels
from d2ft_hpc.planning.multiple_choice import share_of_time
from d2ft_hpc.planning.plan import Operation
from d2ft_hpc.planning.prices import Limit, scarce
from d2ft_hpc.planning.problem import BUDGET_EPSILON, PlanProblem


@dataclass(frozen=True, eq=False)
class LockstepStage:
    """The tensor-parallel ranks of one stage, which run every (slot, block) together: those of one replica, or of all
    replicas if these meet in every block.

    rows: int64 [replica, slot]. blocks: int64 [block]. The stage's classes are the pairs of slot and block, by slot.
    heads: int64 [block, head, rank], timm's index of each rank's heads. devices: int64 [member], a member being a
        rank of a replica, replica by replica; these are the ranks of `levels`.
    levels: what the stage can run in a class. time_budget: for all its classes; inf = no limit.
    """

    rows: Ints
    blocks: Ints
    heads: Ints
    devices: Ints
    levels: Levels
    time_budget: float
    group: Ints
    is_even: bool

    @property
    def slots(self) -> int:
        return int(self.rows.shape[1])

    @property
    def groups(self) -> int:
        return int(self.group.max()) + 1

    @property
    def classes_of_group(self) -> int:
        return len(self.group) // self.groups

    def write(self, level: Ints, operations: Operations, deadline: float = math.inf) -> None:
        """Write the best heads at each class's level, int64 [class], into operations [row, block, head]; after the
        deadline, of time.monotonic(), the heads that are only likely to be the best."""
        chosen = self.levels.operations(level, deadline)
        chosen = chosen.reshape(*chosen.shape[:2], self.slots, len(self.blocks))
        for member in range(len(self.devices)):
            replica, rank = divmod(member, self.heads.shape[2])
            cells = self.rows[replica][:, None, None], self.blocks[:, None], self.heads[:, :, rank]
            operations[cells] = chosen[:, member].transpose(1, 2, 0)


def meeting_replicas(problem: PlanProblem) -> list[Ints]:
    """Replicas that wait for each other in every block, and are planned together."""
    every = np.arange(problem.replicas)
    return [every] if problem.replicas_meet else list(every[:, None])


def lockstep_stages(
    problem: PlanProblem,
    replicas: Ints,
    gains: tuple[Floats, Floats],
    most_shortcut: float,
    *,
    clusters: bool = False,
    deadline: float = math.inf,
) -> list[LockstepStage]:
    """A `Stage` for every pipeline stage of the replicas that meet. Raises PlanError as `solve_makespan` does.

    gains: of the problem (`PlanProblem.gains`).
    clusters: where messages are limited, levels at which only some of a stage's ranks run anything count, too.
    deadline: of time.monotonic(). If what levels give is not known by then, it is estimated for all stages
        (`Levels.is_exact`).
    """
    if not 0 <= most_shortcut <= 1:
        raise PlanError(f"most_shortcut is a share of a rank's heads in [0, 1], got {most_shortcut}.")
    make, numbers = partial(_lockstep_stage, problem, replicas, gains, clusters), range(problem.stages)
    try:
        every = [make(number, share_of_time(deadline, problem.stages - number)) for number in numbers]
    except TimeoutError:
        every = [make(number, None) for number in numbers]
    stages = []
    for stage in every:
        heads = len(stage.levels.forward_gain)
        least = heads - math.floor(most_shortcut * heads + BUDGET_EPSILON)
        stage = replace(stage, levels=stage.levels.that_run(least))
        if any((limit.most < 0).any() for limit in step_limits(problem, stage)):  # even for level 0
            raise PlanError(_unpaid(problem, stage, least))
        stages.append(stage)
    return stages


def _lockstep_stage(
    problem: PlanProblem,
    replicas: Ints,
    problem_gains: tuple[Floats, Floats],
    clusters: bool,
    stage: int,
    deadline: float | None,
) -> LockstepStage:
    """The ranks of a stage with all levels. deadline: None = what these give is estimated.

    Raises PlanError if a rank's number of heads varies by block, TimeoutError at the deadline.
    """
    rows = replicas[:, None] + np.arange(0, problem.forward_score.shape[0], problem.replicas)
    blocks = np.flatnonzero(problem.stage == stage)
    devices = (
        (replicas[:, None] * problem.stages + stage) * problem.ranks + np.arange(problem.ranks)
    ).ravel()
    counts = np.stack([(problem.rank[blocks] == rank).sum(axis=1) for rank in range(problem.ranks)])
    if len(blocks) == 0:
        raise PlanError(f"Stage {stage} holds no block. Number the stages from 0 without gaps.")
    if counts.min() != counts.max():
        raise PlanError(
            f"Planning in lock step needs equally many heads on every rank in every block, but on stage {stage} the "
            f"numbers go from {counts.min()} to {counts.max()}. Divide the heads evenly."
        )
    owned = np.argsort(problem.rank[blocks], axis=1, kind="stable")
    heads = owned.reshape(len(blocks), problem.ranks, -1).transpose(0, 2, 1)  # [block, head, rank]
    gains = [
        gain[rows[:, :, None, None, None], blocks[:, None, None], heads]  # [replica, slot, block, head, rank]
        .transpose(3, 0, 4, 1, 2)
        .reshape(heads.shape[1], len(devices), -1)
        for gain in problem_gains
    ]
    costs = problem.compute_cost
    speed = problem.device_speed[devices]
    is_even = bool((speed == speed[0]).all())
    pay = any(problem.meeting_cost) and bool(np.isfinite(problem.communication_budget[devices]).all())
    clusters = clusters and pay and is_even and len(replicas) == 1
    make = estimate_levels if deadline is None else partial(make_levels, clusters=clusters, deadline=deadline)
    levels = make(
        *gains,
        forward_cost=costs[Operation.FORWARD_ONLY] - costs[Operation.SHORTCUT],
        backward_cost=costs[Operation.FULL] - costs[Operation.FORWARD_ONLY],
        speed=speed,
    )
    row_of_class = np.repeat(np.arange(rows.shape[1]), len(blocks))
    group = row_of_class if problem.stages > 1 else np.zeros_like(row_of_class)
    return LockstepStage(rows, blocks, heads, devices, levels, time_budget(problem, devices), group, is_even)


def time_budget(problem: PlanProblem, devices: Ints) -> float:
    """Time until the first device has used up its compute budget; inf if all may run densely."""
    cells = problem.cells_per_device[devices]
    budget = problem.budgets_to_plan[devices, 0]
    scarce = budget < cells * problem.compute_cost[Operation.FULL]
    left = budget - cells * problem.compute_cost[Operation.SHORTCUT]
    return float(min((left / problem.device_speed[devices])[scarce], default=math.inf))


def step_limits(problem: PlanProblem, stage: LockstepStage) -> list[Limit]:
    """What a stage may use if there is no pipeline: the time of all its classes together."""
    levels = stage.levels
    most = stage.time_budget
    if stage.is_even and math.isfinite(most):
        cells = len(levels.value) * len(levels.forward_gain)
        most = largest_use(cells, *head_times(problem, stage), most)
    everything = np.zeros(len(levels.value), dtype=np.int64)
    time_limit = limit_above_least(levels.forward_time + levels.backward_time, everything, np.array([most]))
    return [time_limit, *other_limits(problem, stage)]


def other_limits(problem: PlanProblem, stage: LockstepStage) -> list[Limit]:
    """The limits on a device's communication in a batch and on its memory in a row, as far as there are any."""
    levels, cells = stage.levels, problem.cells_per_device[stage.devices]
    shortcut = problem.communication_cost[Operation.SHORTCUT]
    row = np.repeat(np.arange(stage.slots), len(stage.blocks))  # of each class
    limits = []
    for member in range(1 if stage.is_even else len(stage.devices)):
        devices = stage.devices if stage.is_even else stage.devices[member : member + 1]
        most = problem.budgets_to_plan[devices, 1].min() - cells[member] * shortcut
        memory = np.full(stage.slots, problem.memory_budget[devices].min())
        limits += [
            limit_above_least(_messages(problem, levels, member), np.zeros_like(row), np.array([most])),
            limit_above_least(levels.backward_heads[:, member].astype(np.float64), row, memory),
        ]
    return scarce(limits)


def _messages(problem: PlanProblem, levels: Levels, member: int) -> Floats:
    """What the member's heads and meetings send at each level above SHORTCUT everywhere, float64 [level]."""
    shortcut, forward, full = problem.communication_cost
    forward_meeting, backward_meeting = problem.meeting_cost
    first = member - member % problem.ranks  # of the member's replica
    its_ranks = slice(first, first + problem.ranks)
    active, training = (
        np.minimum((heads[:, its_ranks] > 0).sum(axis=1), most_ranks)
        for heads, most_ranks in (
            (levels.forward_heads, levels.forward_ranks),
            (levels.backward_heads, levels.backward_ranks),
        )
    )
    shares = shares_of_senders(problem.token_layout, problem.ranks)
    return np.asarray(
        (forward - shortcut) * levels.forward_heads[:, member]
        + (full - forward) * levels.backward_heads[:, member]
        + forward_meeting * shares[active, active]
        + backward_meeting * shares[active, training]
    )


def limit_above_least(use: Floats, group: Ints, most: Floats) -> Limit:
    """The limit on what levels use beyond level 0, which every class has anyway."""
    return Limit(use - use[0], group, most - np.bincount(group, minlength=len(most)) * use[0])


def head_times(problem: PlanProblem, stage: LockstepStage) -> tuple[float, float]:
    """Time of one head's forward, and of its backward on top, on the slowest of the stage's ranks."""
    shortcut, forward, full = problem.compute_cost
    speed = float(problem.device_speed[stage.devices].min())
    return (forward - shortcut) / speed, (full - forward) / speed


def _unpaid(problem: PlanProblem, stage: LockstepStage, least: int) -> str:
    """The message for budgets that do not pay for `least` heads of every rank in each class."""
    cells = problem.cells_per_device[stage.devices]
    share = least / len(stage.levels.forward_gain)
    costs_of = {"compute": problem.compute_cost, "communication": problem.communication_cost}
    for (resource, (shortcut, forward, _)), budget in zip(
        costs_of.items(), problem.budgets_to_plan[stage.devices].T, strict=True
    ):
        need = cells * (shortcut + share * (forward - shortcut))
        index = int((budget - need).argmin())
        if need[index] > budget[index]:
            device = int(stage.devices[index])
            return (
                f"The {resource} budget of {problem.device_names[device]} is {budget[index]:g}, but {share:.0%} of its "
                f"heads running forward use {need[index]:g} (most_shortcut). The least feasible {resource} budget is "
                f"{problem.least_budget(resource, device, need[index])} of its dense step; raise it or most_shortcut."
            )
    slowest = problem.device_names[stage.devices[int(problem.device_speed[stage.devices].argmin())]]
    return f"In lock step with {slowest}, the budgets do not pay for {least} heads running forward on every rank."
