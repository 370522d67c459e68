"""Levels within a time that is split into one part for the forwards and one for the backwards.

A pipeline wants that: if every stage has the same two parts for every row, no stage waits for another. Ranks of one
speed gain by it as well: a split is then two whole numbers of heads, and for given numbers the best levels need no
search. The linear program over them has integer solutions, because a level's value is M-natural-concave in its
numbers of heads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.arrays import Flags, Floats
from d2ft_hpc.planning.highs import OPTIMAL
from d2ft_hpc.planning.levels import Levels
from d2ft_hpc.planning.lockstep import LockstepStage, head_times, limit_above_least, other_limits
from d2ft_hpc.planning.multiple_choice import Choice, choose, share_of_time, worth_of
from d2ft_hpc.planning.prices import ROUNDING, Limit, bounds_of
from d2ft_hpc.planning.problem import BUDGET_EPSILON, PlanProblem

_RELATIVE_GAP = 5e-6
"""Splits are tried until the best is proved to be this near the optimum."""

_EVENNESS = 1e-6  # share of a class's mean value: plans lose less by it than what counts as no gap


def choose_by_split(
    problem: PlanProblem, stages: list[LockstepStage], deadline: float
) -> tuple[list[Choice], float]:
    """Levels for every stage of one replica, and a bound.

    The time of a group of classes (one row in a pipeline, else all classes) is split the same way for all groups and
    stages. One split is solved; its prices say how good any other could be; the most promising one is solved next,
    until none promises more than the best one has. If levels are only estimated, one split is tried, and the bound is
    that of the time alone, which clusters do not change.
    """
    group_time, splits = _splits(problem, stages)
    if not len(splits):
        raise PlanError(
            "The budgets do not pay for the heads that most_shortcut makes run forward in every stage at the pace of "
            "the slowest. Raise the compute budget or most_shortcut."
        )
    even = [
        choose(stage.levels.value, [_group_limit(stage, group_time)], deadline=deadline, search=False)
        for stage in stages
    ]
    is_exact = all(stage.levels.is_exact for stage in stages)
    promise = np.full(len(splits), sum(choice.bound for choice in even))
    backward = [
        stage.levels.backward_time[c.option].sum() / stage.groups
        for stage, c in zip(stages, even, strict=True)
    ]
    split = int(np.abs(splits - np.mean(backward)).argmin())
    best: list[Choice] = []
    best_value = -math.inf
    enough = -math.inf  # a split that promises no more than this is not worth a try
    reason = OPTIMAL  # or the reason why a split that was tried may still be better than the best
    while (promise[split] > enough and time.monotonic() < deadline) or not best:
        choices = []
        promises = np.zeros(len(splits))
        for index, stage in enumerate(stages):
            if best and time.monotonic() > deadline:
                break
            until = deadline if best else share_of_time(deadline, len(stages) - index)
            limits = _part_limits(problem, stage, group_time - splits[split], splits[split])
            values = stage.levels.value
            possible = _possible(limits)
            penalty = _unevenness(stage, limits, possible)
            choice = choose(
                values - penalty,
                limits,
                deadline=until,
                relative_gap=_RELATIVE_GAP,
                search=is_exact,
            )
            choices.append(choice if is_exact else replace(choice, status="time limit"))
            choice = replace(choice, value=worth_of(values, choice.option))
            its_promises = np.full(len(splits), float(bounds_of(values, limits, choice.prices).sum()))
            for part, parts in ((0, group_time - splits), (1, splits)):
                price = float(choice.prices[part].sum())
                if price > 0:
                    most = np.array([_whole_heads(problem, stage, part, time) for time in parts])
                    its_promises += price * (most - most[split])
            paid = len(values) * float(penalty[possible].max())
            its_promises[split] = max(choice.value, min(its_promises[split], choice.bound + paid))
            promises += np.minimum(its_promises, even[index].bound) if is_exact else even[index].bound
        if len(choices) < len(stages):
            break
        promise = np.minimum(promise, promises)
        value = sum(choice.value for choice in choices)
        if value > best_value:
            best, best_value = choices, value
        enough = max(enough, best_value * (1 + _RELATIVE_GAP))
        if promise[split] > enough:
            enough = float(promise[split])
            reason = next((choice.status for choice in choices if choice.status != OPTIMAL), OPTIMAL)
        split = int(promise.argmax())
    if promise.max() > enough:
        best = [replace(choice, status="time limit") for choice in best]
    elif promise.max() > best_value * (1 + _RELATIVE_GAP):
        best = [replace(choice, status=reason) if choice.status == OPTIMAL else choice for choice in best]
    return best, float(promise.max())


def _splits(problem: PlanProblem, stages: list[LockstepStage]) -> tuple[float, Floats]:
    """What every stage gets for a group: the share of the stage that finishes first, within what all may use. And the
    times in it for the backward passes that are worth trying, float64 [split]: whole heads on the slowest rank of the
    stage with most blocks, up to the dense backward of all stages."""

    def of_all(times: Callable[[Levels], float]) -> float:
        return max(stage.classes_of_group * times(stage.levels) for stage in stages)

    _, head_time = head_times(problem, max(stages, key=lambda stage: stage.classes_of_group))
    dense = of_all(lambda levels: float(levels.backward_time.max()))
    count = math.ceil(dense / head_time - BUDGET_EPSILON) if head_time else 0
    forward = of_all(lambda levels: float(levels.forward_time.max()))
    most = (forward + count * head_time) * (1 + BUDGET_EPSILON)
    group_time = min(*(stage.time_budget / stage.groups for stage in stages), most)
    splits: Floats = np.arange(count + 1.0) * head_time
    return group_time, splits[splits <= group_time - of_all(lambda levels: float(levels.forward_time[0]))]


def _group_limit(stage: LockstepStage, group_time: float) -> Limit:
    times = stage.levels.forward_time + stage.levels.backward_time
    return limit_above_least(times, stage.group, np.full(stage.groups, group_time))


def _part_limits(
    problem: PlanProblem, stage: LockstepStage, forward_time: float, backward_time: float
) -> list[Limit]:
    """The parts of a group's time first, then the stage's other limits."""
    parts = []
    for part, (use, time_) in enumerate(
        ((stage.levels.forward_time, forward_time), (stage.levels.backward_time, backward_time))
    ):
        most = _whole_heads(problem, stage, part, time_)
        parts.append(limit_above_least(use, stage.group, np.full(stage.groups, most)))
    return [*parts, *other_limits(problem, stage)]


def _whole_heads(problem: PlanProblem, stage: LockstepStage, part: int, time_: float) -> float:
    """`time_` rounded down to what whole numbers of heads can use. part: 0 forward, 1 backward."""
    head_time = head_times(problem, stage)[part]
    if not stage.is_even or head_time == 0:
        return time_
    return math.floor(time_ / head_time + BUDGET_EPSILON) * head_time


def _possible(limits: list[Limit]) -> Flags:
    """The levels that a class may have while all others have the least, bool [level]."""
    return np.asarray(np.all([limit.use <= limit.most.max() * (1 + ROUNDING) for limit in limits], axis=0))


def _unevenness(stage: LockstepStage, limits: list[Limit], possible: Flags) -> Floats:
    """A tiny cost of levels far from the mean, float64 [level], so that equal scores get even levels. possible: bool
    [level], the levels whose values set its size. Without this cost, prices could not tell equal levels apart and
    would take extreme ones, of which no whole number fits.
    """
    levels = stage.levels
    distance: Floats = np.zeros(len(levels.forward_time))
    for limit in limits[:2]:
        if limit.use.max() > 0:
            distance += ((limit.use - limit.most[0] / stage.classes_of_group) / limit.use.max()) ** 2
    return np.asarray(_EVENNESS * levels.value[:, possible].max(axis=1).mean() * distance)
