"""Coverage: the least number of FULL rows that every head gets in a batch, for planners that choose levels.

A level says how many heads of a rank are FULL. Every head can get its rows if a block's FULL heads add up to enough
over the rows (`short_blocks`); which heads take turns is settled afterwards (`take_turns`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.plan import Operation
from d2ft_hpc.planning.problem import BUDGET_EPSILON, Floats, Ints, PlanProblem
from d2ft_hpc.planning.teams import Team, head_times

_FIRST_REWARD, _GROWTH, _ROUNDS = 0.02, 2.0, 20  # in units of a head's mean gain


def demand_of(problem: PlanProblem, coverage: int, replicas: Ints) -> int:
    """The FULL rows that every head gets on each of these replicas. Raises PlanError if coverage is out of range."""
    rows = problem.forward_score.shape[0]
    if not 0 <= coverage <= rows:
        raise PlanError(f"coverage must be from 0 to the number of rows, {rows}, got {coverage}.")
    return coverage // problem.replicas + int(replicas.min() < coverage % problem.replicas)


def short_blocks(team: Team, level: Ints, demand: int) -> npt.NDArray[np.bool_]:
    """Which blocks have too few FULL heads on some rank, bool [block]. level: int64 [class]."""
    full = team.levels.backward_heads[level].reshape(team.slots, len(team.blocks), -1).sum(axis=0)
    return np.asarray((full < demand * len(team.levels.forward_gain)).any(axis=1))


def rewarded(team: Team, reward: Floats, demand: int) -> Team:
    """The team with `reward` float64 [block] for every FULL head up to as many as even turns need in each row."""
    even_turns = demand * len(team.levels.forward_gain) / team.slots
    counted = np.minimum(team.levels.backward_heads.min(axis=1), even_turns)  # [level]
    of_class = np.tile(reward, team.slots)
    return replace(team, levels=replace(team.levels, value=team.levels.value + of_class[:, None] * counted))


def rewards() -> Iterator[float]:
    """Rewards worth a try, one after the other."""
    return (_FIRST_REWARD * _GROWTH**round_ for round_ in range(_ROUNDS))


def take_turns(team: Team, operations: npt.NDArray[np.uint8], demand: int) -> bool:
    """Exchange heads of a rank in single rows, in operations [row, block, head], until each has its FULL rows; whether
    any had too few.

    A head with too few takes over a row from one with more than enough, where that costs least; no level changes.
    """
    if demand == 0:
        return False
    gains = np.stack(
        [np.zeros_like(team.levels.forward_gain), team.levels.forward_gain, team.levels.backward_gain]
    ).cumsum(axis=0)
    gains = gains.reshape(*gains.shape[:3], team.slots, len(team.blocks))
    any_short = False
    for member, rows, heads in team.members():
        for index, block in enumerate(team.blocks):
            place = np.ix_(rows, [block], heads[index])
            chosen = operations[place][:, 0]  # [slot, head]
            if (chosen == Operation.FULL).sum(axis=0).min() < demand:
                operations[place] = _exchanged(chosen, gains[:, :, member, :, index], demand)[:, None]
                any_short = True
    return any_short


def _exchanged(chosen: npt.NDArray[np.uint8], gain: Floats, demand: int) -> npt.NDArray[np.uint8]:
    """chosen: [row, head], changed in place. gain: float64 [operation, head, row]."""
    rows = np.arange(len(chosen))
    while True:
        full = (chosen == Operation.FULL).sum(axis=0)
        hungry = int(full.argmin())
        if full[hungry] >= demand:
            return chosen
        of_hungry = chosen[:, hungry]
        change = gain[Operation.FULL, hungry] - gain[of_hungry, hungry, rows]  # [row]
        lost = (
            gain[of_hungry, :, rows] - gain[Operation.FULL].T
        )  # [row, head], when a head takes the hungry one's part
        loss = np.where(
            (chosen == Operation.FULL) & (full > demand) & (of_hungry != Operation.FULL)[:, None],
            change[:, None] + lost,
            -np.inf,
        )
        row, giver = divmod(int(loss.argmax()), chosen.shape[1])
        chosen[row, hungry], chosen[row, giver] = chosen[row, giver], chosen[row, hungry]


def is_affordable(problem: PlanProblem, team: Team, demand: int) -> bool:
    """Whether the team's time would pay for the demand if nothing else ran."""
    heads = demand * len(team.blocks) * len(team.levels.forward_gain)
    return heads * sum(head_times(problem, team)) <= team.time_budget * (1 + BUDGET_EPSILON)


def unpaid_coverage(problem: PlanProblem, team: Team, coverage: int) -> str:
    """The message for budgets that do not pay for the coverage."""
    rows = problem.forward_score.shape[0]
    least = int(team.levels.forward_heads[0].min())
    shortcut, forward, full = problem.compute_cost
    running = max(least / len(team.levels.forward_gain), coverage / rows)
    cost = shortcut + running * (forward - shortcut) + coverage / rows * (full - forward)
    share = problem.always_share + (1 - problem.always_share) * cost / full
    slowest = problem.device_names[team.devices[int(problem.device_speed[team.devices].argmin())]]
    return (
        f"No plan within the budgets was found that gives every block and head {coverage} FULL rows (coverage) in lock "
        f"step with {slowest}. That takes at least {np.ceil(share * 1e4 - BUDGET_EPSILON) / 1e4:g} of the dense "
        f"compute on every device; raise the budgets or lower the coverage."
    )
