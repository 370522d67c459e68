"""Second part of head placement: swaps two heads between ranks as long as plans in lock step gain by it.

A plan in lock step (`makespan`) says how many heads every rank runs forward and backward in each (row, block). A rank
runs its best heads, so a swap changes the score by how much the two ranks' best heads change in worth. All swaps of a
block are tried at once, and the best is made, until none gains; then plan and prices are made anew.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from d2ft_hpc.planning.arrays import Floats, Ints
from d2ft_hpc.planning.makespan import solve_makespan
from d2ft_hpc.planning.plan import Operation
from d2ft_hpc.planning.problem import PlanProblem

_ROUNDS = 4
_SECONDS = 10.0
_PLAN_SECONDS = 1.0
_LEAST_GAIN = 1e-6  # of a head's mean gain


@dataclass(frozen=True, eq=False)
class _Kind:
    """Forwards or backwards of one block. value: float64 [row, head], what each is worth at the block's prices.
    count: int64 [row, rank], how many each rank runs."""

    value: Floats
    count: Ints


def swap_heads(problem: PlanProblem) -> Ints:
    """An owner map int64 [block, head] with as many heads on each rank as in the problem's own, that plans in lock step
    score more with. The same problem gives the same map, unless time runs out.

    Raises PlanError where `solve_makespan` does.
    """
    deadline = time.monotonic() + _SECONDS
    owner: Ints = problem.rank.copy()
    for _ in range(_ROUNDS):
        before = owner.copy()
        for block, kinds in enumerate(_kinds(replace(problem, rank=owner))):
            _swap_in_block(owner[block], kinds, problem.ranks, deadline)
        if np.array_equal(before, owner) or time.monotonic() > deadline:
            break
    return owner


def _kinds(problem: PlanProblem) -> list[list[_Kind]]:
    """Forwards and backwards of every block under the present placement's plan.

    The counts of a (row, block) put a price on a forward and one on a backward: what the last one that runs is worth.
    Running a head's forward is then worth its own gain, or that of running both less the backward's price; and so for
    its backward.
    """
    operations = solve_makespan(problem, time_limit_seconds=_PLAN_SECONDS).operations
    forward_gain, backward_gain = problem.gains()
    shortcut, forward_only, full = problem.compute_cost
    forward_cost, backward_cost = forward_only - shortcut, full - forward_only
    per_cost = gains_per_cost(problem, forward_gain, backward_gain)
    runs = (operations >= Operation.FORWARD_ONLY, operations == Operation.FULL)
    forward_price, backward_price = (
        cost * _price_of_last(worth, its_runs.sum(axis=2))
        for cost, worth, its_runs in zip((forward_cost, backward_cost), per_cost, runs, strict=True)
    )
    together = forward_gain + backward_gain
    values = (
        np.maximum(forward_gain, together - backward_price),
        np.maximum(np.minimum(backward_gain, together - forward_price), 0.0),
    )
    is_held = [problem.rank == rank for rank in range(problem.ranks)]
    counts = [np.stack([(its_runs & held).sum(axis=2) for held in is_held], axis=2) for its_runs in runs]
    return [
        [_Kind(value[:, block], count[:, block]) for value, count in zip(values, counts, strict=True)]
        for block in range(len(problem.rank))
    ]


def gains_per_cost(
    problem: PlanProblem, forward_gain: Floats, backward_gain: Floats
) -> tuple[Floats, Floats]:
    """Up to which price of compute a head is worth running forward, and up to which backward, too: float64, as the
    gains."""
    shortcut, forward_only, full = problem.compute_cost
    both = (forward_gain + backward_gain) / max(full - shortcut, 1e-12)
    return (
        np.maximum(forward_gain / max(forward_only - shortcut, 1e-12), both),
        np.minimum(backward_gain / max(full - forward_only, 1e-12), both),
    )


def _price_of_last(worth: Floats, count: Ints) -> Floats:
    """Between the worth of the last head that `count` [row, block] lets run and the next, float64 [row, block, 1]."""
    falling = -np.sort(-worth, axis=2)
    ends = np.zeros((*worth.shape[:2], 1))
    padded = np.concatenate([falling[:, :, :1], falling, ends], axis=2)
    place = count[:, :, None]
    last, following = (np.take_along_axis(padded, at, axis=2) for at in (place, place + 1))
    return np.asarray((last + following) / 2)


def _swap_in_block(owner: Ints, kinds: list[_Kind], ranks: int, deadline: float) -> None:
    """Make the best swap in owner int64 [head] until none gains."""
    heads = len(owner)
    for _ in range(heads * ranks):
        gain: Floats = np.zeros((heads, heads))
        for kind in kinds:
            replaced = _gain_of_replacing(owner, kind, ranks)
            gain += replaced + replaced.T
        gain[owner[:, None] == owner] = 0.0
        one, other = divmod(int(gain.argmax()), heads)
        if gain[one, other] <= _LEAST_GAIN or time.monotonic() > deadline:
            return
        owner[[one, other]] = owner[[other, one]]


def _gain_of_replacing(owner: Ints, kind: _Kind, ranks: int) -> Floats:
    """How much more the best heads of a rank are worth if one of its heads is replaced, summed over the rows.

    Returns float64 [head, other head]: head leaves its rank and the other takes its place.
    """
    rows = len(kind.value)
    by_rank = np.argsort(owner, kind="stable")
    value = kind.value[:, by_rank].reshape(rows, ranks, -1)  # [row, rank, place]
    count = kind.count[:, :, None]
    order = np.argsort(-value, axis=2, kind="stable")
    falling = np.take_along_axis(value, order, axis=2)
    end = np.zeros((rows, ranks, 1))
    last = np.take_along_axis(falling, np.maximum(count - 1, 0), axis=2)
    following = np.take_along_axis(np.concatenate([falling, end], axis=2), count, axis=2)
    # Without a head that runs, the next best takes its place; a newcomer then runs if it beats the last that does.
    is_running = np.argsort(order, axis=2) < count
    loss = np.where(is_running, value - following, 0.0)
    to_beat = np.where(count == 0, np.inf, np.where(is_running, following, last))
    back = np.argsort(by_rank)
    loss, to_beat = (each.reshape(rows, -1)[:, back] for each in (loss, to_beat))
    won = np.maximum(kind.value[:, None, :] - to_beat[:, :, None], 0.0).sum(axis=0)
    return np.asarray(won - loss.sum(axis=0)[:, None])
