"""Planning for the clock: tensor-parallel ranks in lock step, pipeline stages balanced row by row."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.choose import RELATIVE_GAP, Choice, Limit, choose
from d2ft_hpc.planning.highs import OPTIMAL
from d2ft_hpc.planning.knapsack import largest_use, plan_with_bound
from d2ft_hpc.planning.levels import Levels, make_levels
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.problem import BUDGET_EPSILON, Floats, Ints, PlanProblem, round_up

_EVENNESS = 1e-6  # of a class's mean value: what plans may lose by it is below what counts as no gap


@dataclass(frozen=True, eq=False)
class Team:
    """The ranks of one stage of one replica, which run every (row, block) together.

    rows, blocks: int64 [row], [block], what the team runs; its classes are these pairs, row by row.
    heads: int64 [block, head, rank], timm's index of each rank's heads. devices: int64 [rank].
    levels: what the team can run in a class. time_budget: for all its classes; inf = no limit.
    """

    rows: Ints
    blocks: Ints
    heads: Ints
    devices: Ints
    levels: Levels
    time_budget: float

    @property
    def row_of_class(self) -> Ints:
        """int64 [class], places in `rows`."""
        return np.repeat(np.arange(len(self.rows)), len(self.blocks))

    @property
    def is_even(self) -> bool:
        """Whether all ranks are equally fast, so that a level is the same number of heads on each."""
        runs = np.concatenate([self.levels.forward_heads, self.levels.backward_heads])
        return bool((runs == runs[:, :1]).all())

    def write(self, level: Ints, operations: npt.NDArray[np.uint8]) -> None:
        """Put the best heads at the level int64 [class] of each class into operations [row, block, head]."""
        chosen = self.levels.operations(level)
        chosen = chosen.reshape(*chosen.shape[:2], len(self.rows), len(self.blocks))
        rows, blocks = self.rows[:, None, None, None], self.blocks[:, None, None]
        operations[rows, blocks, self.heads] = chosen.transpose(2, 3, 0, 1)


def solve_makespan(
    problem: PlanProblem,
    *,
    forward_weight: float = 1.0,
    backward_weight: float = 1.0,
    most_shortcut: float = 1.0,
    time_limit_seconds: float = 10.0,
) -> SkipPlan:
    """Maximise the objective of `solve_joint` with all ranks of a stage in lock step (`levels`).

    The budget is the time in which the first device of a team reaches its compute budget. With several stages,
    every stage gets the same time for the forward of every row, and the same for every backward, so that no stage
    of the pipeline waits for another; how the two share the row's time is chosen, too.

    most_shortcut: share in [0, 1] of every rank's heads that may be SHORTCUT in a (row, block).
    time_limit_seconds: wall-clock time, > 0.

    Bound and gap are those of this problem: no other plan in lock step (and with such rows) scores more.
    Where time runs out, the plan that the prices suggest is taken; the status says so.

    Raises PlanError if an option is out of range, if ranks do not hold equally many heads in all blocks, or if the
    budgets do not pay for `most_shortcut` (the message names the device and the least feasible budget).
    """
    if not time_limit_seconds > 0:
        raise PlanError(f"time_limit_seconds must be > 0, got {time_limit_seconds}.")
    deadline = time.monotonic() + time_limit_seconds
    operations = np.full(problem.forward_score.shape, Operation.SHORTCUT, dtype=np.uint8)
    bound, statuses = 0.0, set()
    for replica in range(problem.replicas):
        teams = make_teams(problem, replica, forward_weight, backward_weight, most_shortcut)
        if len(teams) == 1:
            choices = [choose(teams[0].levels.value, _step_limits(problem, teams[0]), deadline=deadline)]
            bound += choices[0].bound
        else:
            choices, its_bound = _choose_pipeline(problem, teams, deadline)
            bound += its_bound
        for team, choice in zip(teams, choices, strict=True):
            team.write(choice.option, operations)
            statuses.add(choice.status)
    status = OPTIMAL if statuses == {OPTIMAL} else "; ".join(sorted(statuses - {OPTIMAL}))
    return plan_with_bound(
        problem,
        operations,
        planner="makespan",
        status=status,
        forward_weight=forward_weight,
        backward_weight=backward_weight,
        bound=bound,
    )


def make_teams(
    problem: PlanProblem, replica: int, forward_weight: float, backward_weight: float, most_shortcut: float
) -> list[Team]:
    """The teams of all stages of a replica. Raises PlanError as `solve_makespan` does."""
    if not 0 <= most_shortcut <= 1:
        raise PlanError(f"most_shortcut is a share of a rank's heads in [0, 1], got {most_shortcut}.")
    teams = []
    for stage in range(problem.stages):
        team = _make_team(problem, replica, stage, forward_weight, backward_weight)
        heads = len(team.levels.forward_gain)
        least = heads - math.floor(most_shortcut * heads + BUDGET_EPSILON)
        team = replace(team, levels=team.levels.that_run(least))
        if not fitting_levels(problem, team)[0]:
            raise PlanError(_unpaid(problem, team, least))
        teams.append(team)
    return teams


def _make_team(
    problem: PlanProblem, replica: int, stage: int, forward_weight: float, backward_weight: float
) -> Team:
    """The ranks of a stage with all levels. Raises PlanError if a rank's number of heads varies by block."""
    rows = np.arange(replica, problem.forward_score.shape[0], problem.replicas)
    blocks = np.flatnonzero(problem.stage == stage)
    devices = (replica * problem.stages + stage) * problem.ranks + np.arange(problem.ranks)
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
        gain[rows[:, None, None, None], blocks[:, None, None], heads]  # [row, block, head, rank]
        .transpose(2, 3, 0, 1)
        .reshape(*heads.shape[1:], -1)
        for gain in problem.gains(forward_weight, backward_weight)
    ]
    costs = problem.compute_cost
    levels = make_levels(
        *gains,
        forward_cost=costs[Operation.FORWARD_ONLY] - costs[Operation.SHORTCUT],
        backward_cost=costs[Operation.FULL] - costs[Operation.FORWARD_ONLY],
        speed=problem.device_speed[devices],
    )
    return Team(rows, blocks, heads, devices, levels, time_budget(problem, devices))


def time_budget(problem: PlanProblem, devices: Ints) -> float:
    """Time until the first of the devices has used up its compute budget; inf if all may run densely."""
    cells = problem.cells_per_device()[devices]
    budget = problem.budgets()[devices, 0]
    scarce = budget < cells * problem.compute_cost[Operation.FULL]
    left = budget - cells * problem.compute_cost[Operation.SHORTCUT]
    return float(min((left / problem.device_speed[devices])[scarce], default=math.inf))


def _step_limits(problem: PlanProblem, team: Team) -> list[Limit]:
    """What a team without a pipeline may use: the time of all its classes together."""
    levels = team.levels
    most = team.time_budget
    if team.is_even and math.isfinite(most):
        cells = len(levels.value) * len(levels.forward_gain)
        most = largest_use(cells, *_head_times(problem, team), most)
    everything = np.zeros(len(levels.value), dtype=np.int64)
    time_limit = _limit(levels.forward_time + levels.backward_time, everything, np.array([most]))
    return [time_limit, *_other_limits(problem, team)]


def _limit(use: Floats, group: Ints, most: Floats) -> Limit:
    """The limit on what levels use above level 0, which every class has at least."""
    return Limit(use - use[0], group, most - np.bincount(group, minlength=len(most)) * use[0])


def fitting_levels(problem: PlanProblem, team: Team) -> npt.NDArray[np.bool_]:
    """Whether the team's budgets pay for a level in all its classes, bool [level]."""
    fits = np.ones(len(team.levels.forward_time), dtype=bool)
    for limit in _step_limits(problem, team):
        classes = np.bincount(limit.group, minlength=len(limit.most))
        fits &= (limit.use[:, None] * classes <= limit.most * (1 + BUDGET_EPSILON / 10)).all(axis=1)
    return fits


def _other_limits(problem: PlanProblem, team: Team) -> list[Limit]:
    """The communication of a device in the batch and its memory in a row, as far as they are limited."""
    levels, cells = team.levels, problem.cells_per_device()[team.devices]
    shortcut, forward, full = problem.communication_cost
    row = team.row_of_class
    limits = []
    for rank in range(1 if team.is_even else len(team.devices)):
        devices = team.devices if team.is_even else team.devices[rank : rank + 1]
        runs, trains = levels.forward_heads[:, rank], levels.backward_heads[:, rank]
        message = (forward - shortcut) * runs + (full - forward) * trains
        most = problem.budgets()[devices, 1].min() - cells[rank] * shortcut
        memory = np.full(len(team.rows), problem.memory_budget[devices].min())
        limits += [
            _limit(message, np.zeros_like(row), np.array([most])),
            _limit(trains.astype(np.float64), row, memory),
        ]
    return [limit for limit in limits if np.isfinite(limit.most).all()]


def _unpaid(problem: PlanProblem, team: Team, least: int) -> str:
    """The message for budgets that do not pay for `least` heads of every rank in each class."""
    cells = problem.cells_per_device()[team.devices]
    share = least / len(team.levels.forward_gain)
    needs = [
        ("compute", problem.compute_cost, problem.budgets()[team.devices, 0], problem.always_share),
        ("communication", problem.communication_cost, problem.budgets()[team.devices, 1], 0.0),
    ]
    for resource, (shortcut, forward, full), budget, always_share in needs:
        need = cells * (shortcut + share * (forward - shortcut))
        index = int((budget - need).argmin())
        if need[index] > budget[index]:
            of_dense = always_share + (1 - always_share) * need[index] / (cells[index] * full)
            return (
                f"The {resource} budget of {problem.device_names[team.devices[index]]} is {budget[index]:g}, but "
                f"{share:.0%} of its heads running forward use {need[index]:g} (most_shortcut). The least feasible "
                f"{resource} budget is {round_up(of_dense):g} of its dense step; raise it or most_shortcut."
            )
    slowest = problem.device_names[team.devices[int(problem.device_speed[team.devices].argmin())]]
    return f"In lock step with {slowest}, the budgets do not pay for {least} heads running forward on every rank."


def _head_times(problem: PlanProblem, team: Team) -> tuple[float, float]:
    """Time of one head's forward, and of its backward on top, on the slowest of the team's ranks."""
    shortcut, forward, full = problem.compute_cost
    speed = float(problem.device_speed[team.devices].min())
    return (forward - shortcut) / speed, (full - forward) / speed


def _choose_pipeline(problem: PlanProblem, teams: list[Team], deadline: float) -> tuple[list[Choice], float]:
    """Levels for every stage of one replica, and a bound.

    A row's time on every stage is split into a part for its forward and one for its backward, the same for all. One
    split is solved; its prices say how good any other could be; the most promising one is solved next, until none
    promises more than the best one has.
    """
    row_time = _row_time(problem, teams)
    splits = _splits(problem, teams, row_time)  # backward part of each
    no_time = -math.inf  # for HiGHS: prices will do here
    even = [choose(team.levels.value, [_row_limit(team, row_time)], deadline=no_time) for team in teams]
    promise = np.full(len(splits), sum(choice.bound for choice in even))
    backward = [
        team.levels.backward_time[c.option].sum() / len(team.rows)
        for team, c in zip(teams, even, strict=True)
    ]
    split = int(np.abs(splits - np.mean(backward)).argmin())
    best: list[Choice] = []
    best_value = -math.inf
    enough = -math.inf  # a split that promises no more than this is not worth a try
    while (promise[split] > enough and time.monotonic() < deadline) or not best:
        choices = []
        promises = np.zeros(len(splits))
        for team in teams:
            limits = _row_limits(problem, team, row_time - splits[split], splits[split])
            penalty = _unevenness(team, limits)
            choice = choose(team.levels.value - penalty, limits, deadline=deadline)
            choices.append(choice)
            slack = float(penalty.max(axis=1).sum())
            its_promises = np.full(len(splits), choice.price_bound + slack)
            for part, parts in ((0, row_time - splits), (1, splits)):
                price = float(choice.prices[part].sum())
                if price > 0:
                    most = np.array([_whole_heads(problem, team, part, time) for time in parts])
                    its_promises += price * (most - most[split])
            its_promises[split] = choice.bound + slack
            promises += its_promises
        promise = np.minimum(promise, promises)
        value = sum(choice.value for choice in choices)
        if value > best_value:
            best, best_value = choices, value
        enough = max(enough, best_value * (1 + RELATIVE_GAP), promise[split])
        split = int(promise.argmax())
    return best, float(promise.max())


def _row_time(problem: PlanProblem, teams: list[Team]) -> float:
    """What every stage gets for a row: the step's share of the stage that is done first, at most a dense row's."""
    dense = [len(t.blocks) * (t.levels.forward_time.max() + t.levels.backward_time.max()) for t in teams]
    return float(
        min(*(team.time_budget / len(team.rows) for team in teams), max(dense) * (1 + BUDGET_EPSILON))
    )


def _splits(problem: PlanProblem, teams: list[Team], row_time: float) -> Floats:
    """Times for a row's backward that are worth a try, float64 [split]: whole numbers of heads on the slowest rank."""
    largest = max(teams, key=lambda team: len(team.blocks))
    _, head_time = _head_times(problem, largest)
    count = len(largest.blocks) * len(largest.levels.forward_gain)
    splits = np.arange(count + 1) * head_time
    least = max(len(t.blocks) * float(t.levels.forward_time[0]) for t in teams)
    return np.asarray(splits[splits <= row_time - least])


def _row_limit(team: Team, row_time: float) -> Limit:
    times = team.levels.forward_time + team.levels.backward_time
    return _limit(times, team.row_of_class, np.full(len(team.rows), row_time))


def _row_limits(problem: PlanProblem, team: Team, forward_time: float, backward_time: float) -> list[Limit]:
    """The parts of a row's time first, then the team's other limits."""
    parts = []
    for part, (use, time_) in enumerate(
        ((team.levels.forward_time, forward_time), (team.levels.backward_time, backward_time))
    ):
        most = _whole_heads(problem, team, part, time_)
        parts.append(_limit(use, team.row_of_class, np.full(len(team.rows), most)))
    return [*parts, *_other_limits(problem, team)]


def _whole_heads(problem: PlanProblem, team: Team, part: int, time_: float) -> float:
    """`time_` less what no whole number of heads can use; part: 0 forward, 1 backward."""
    head_time = _head_times(problem, team)[part]
    if not team.is_even or head_time == 0:
        return time_
    return math.floor(time_ / head_time + BUDGET_EPSILON) * head_time


def _unevenness(team: Team, limits: list[Limit]) -> Floats:
    """A tiny cost of levels far from the mean, float64 [1, level], so that equal scores get even levels.

    Without it, prices could not tell one level from another, and no whole number of the extreme ones fits.
    """
    levels = team.levels
    distance: Floats = np.zeros(len(levels.forward_time))
    for limit in limits[:2]:
        if limit.use.max() > 0:
            distance += ((limit.use - limit.most[0] / len(team.blocks)) / limit.use.max()) ** 2
    return np.asarray(_EVENNESS * levels.value.max(axis=1).mean() * distance[None, :])
