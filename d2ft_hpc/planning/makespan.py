"""Planning for the clock: tensor-parallel ranks in lock step, pipeline stages balanced row by row."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.bounds import plan_with_bound
from d2ft_hpc.planning.highs import OPTIMAL
from d2ft_hpc.planning.lockstep import LockstepStage, lockstep_stages, meeting_replicas, step_limits
from d2ft_hpc.planning.multiple_choice import Choice, choose, share_of_time
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.planner import Planner, WithShortcuts
from d2ft_hpc.planning.problem import PlanProblem
from d2ft_hpc.planning.split import choose_by_split

_PARTS_OF_TIME = 4
"""One part is for the tables of what levels give. If these are not done by then, one of the remaining parts is for
the choice."""

_WRITING = 2.5  # times the time that the tables took

_SEARCHING = 0.9
"""Share of the time limit; the rest is for the plan's own bound and check."""


def solve_makespan(
    problem: PlanProblem,
    *,
    most_shortcut: float = 1.0,
    time_limit_seconds: float = 10.0,
) -> SkipPlan:
    """Maximise the objective of `solve_joint` with all ranks of a stage in lock step (`levels`).

    Where `meeting_cost` is limited, the heads that run in a (row, block) may also lie on few ranks only, while the
    others wait: that sends less. (Not where ranks differ in speed.) A rank's memory and what its
    heads send by themselves are then counted as if it were always one of the few.

    The budget is the time in which the first device of a stage reaches its compute budget. With several stages,
    every stage gets the same time for the forward of every row, and the same for every backward, so that no stage
    of the pipeline waits for another; how the two share the row's time is chosen, too (where ranks differ in speed,
    among whole heads of the slowest one).

    most_shortcut: share in [0, 1] of every rank's heads that may be SHORTCUT in a (row, block).
    time_limit_seconds: wall-clock time, > 0.

    Bound and gap are those of this problem: no other plan in lock step (and with such rows) scores more.
    Where time runs out, the best plan so far is taken; the status says so. Where there is no time even for the tables
    of what levels give, the plan has one level for each stage, and the bound is that of the time budget alone.

    Raises PlanError if an option is out of range, if ranks do not hold equally many heads in all blocks, or if the
    budgets do not pay for `most_shortcut` (the message names the device and the least feasible budget).
    """
    if not time_limit_seconds > 0:
        raise PlanError(f"time_limit_seconds must be > 0, got {time_limit_seconds}.")
    deadline = time.monotonic() + _SEARCHING * time_limit_seconds
    operations = np.full(problem.forward_score.shape, Operation.SHORTCUT, dtype=np.uint8)
    gains = problem.gains()
    bound, statuses = 0.0, set()
    together = meeting_replicas(problem)
    for index, replicas in enumerate(together):
        start = time.monotonic()
        its_deadline = share_of_time(deadline, len(together) - index)
        stages = lockstep_stages(
            problem,
            replicas,
            gains,
            most_shortcut,
            clusters=True,
            deadline=share_of_time(its_deadline, _PARTS_OF_TIME),
        )
        choices, its_bound = _choose_levels(problem, stages, _end_of_choice(stages, start, its_deadline))
        bound += its_bound
        for stage, choice in zip(stages, choices, strict=True):
            stage.write(choice.option, operations, its_deadline)
            statuses.add(choice.status)
            if time.monotonic() > its_deadline:
                statuses.add("heads: time limit")
    return plan_with_bound(problem, operations, planner=MAKESPAN.name, status=statuses, bound=bound)


def _end_of_choice(stages: list[LockstepStage], start: float, deadline: float) -> float:
    """Until when levels may be chosen. Writing down the best heads needs the time that is left: it takes longer than
    making the tables did, which began at `start`."""
    if not all(stage.levels.is_exact for stage in stages):
        return share_of_time(deadline, _PARTS_OF_TIME)
    now = time.monotonic()
    return max(deadline - _WRITING * (now - start), (now + deadline) / 2)


def _choose_levels(
    problem: PlanProblem, stages: list[LockstepStage], deadline: float
) -> tuple[list[Choice], float]:
    """Levels for every stage of a replica, and a bound."""
    if len(stages) > 1:
        return choose_by_split(problem, stages, deadline)
    (stage,) = stages
    limits = step_limits(problem, stage)
    # Ranks of one speed have a better way than to search.
    is_exact = stage.levels.is_exact
    choice = choose(stage.levels.value, limits, deadline=deadline, search=is_exact and not stage.is_even)
    if not is_exact or (choice.status != OPTIMAL and time.monotonic() > deadline):
        by_time = choose(stage.levels.value, limits[:1], deadline=deadline, search=False).bound
        choice = replace(choice, status="time limit")
        return [choice], min(choice.bound, by_time) if is_exact else by_time
    if choice.status == OPTIMAL or not stage.is_even:
        return [choice], choice.bound
    (by_split,), bound = choose_by_split(problem, stages, deadline)
    if choice.value > by_split.value:  # which can be only where time ran out, or by less than counts
        by_split = replace(choice, status=by_split.status)
    return [by_split], min(bound, choice.bound)


MAKESPAN = Planner(
    "makespan",
    "the best score for the clock: ranks that wait for each other run equally many heads",
    solve_makespan,
    WithShortcuts,
    fits_memory=True,
)
