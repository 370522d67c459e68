"""Levels: how many heads the ranks of one stage run on a row of a block, so that all of them finish together.

Tensor-parallel ranks meet after every branch of every block, so only the slowest rank's work counts. A level is a
pair of times, for the forward and for the backward; each rank runs as many heads forward, and as many of them
backward, as it can finish in those times. Which heads these are is decided for each rank by itself.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from d2ft_hpc.planning.arrays import Flags, Floats, Ints, Operations, places
from d2ft_hpc.planning.plan import Operation
from d2ft_hpc.planning.problem import BUDGET_EPSILON

_BY_LEVEL = (
    *("forward_time", "backward_time", "forward_heads", "backward_heads"),
    *("forward_ranks", "backward_ranks"),
)
_CHUNK_BYTES = 4_000_000  # bytes of a table that stays in the processor's cache


@dataclass(frozen=True, eq=False)
class Levels:
    """The levels of one stage, and what each gives in each class. A class is one (row, block).

    forward_gain, backward_gain: float64 [head, rank, class], the gains of every rank's heads.
    value: float64 [class, level], the largest sum of gains, over all ranks.
    forward_time, backward_time: float64 [level]; level 0 runs least.
    forward_heads, backward_heads: int64 [level, rank], heads that run forward, and those of them that are FULL.
    forward_ranks, backward_ranks: int64 [level], how many ranks run this many heads; the others, in each class
        those whose heads give least, run none. All ranks, unless there are clusters.
    is_exact: if not, `value` is an estimate from above, as if a rank's FULL heads need not be among those that run
        forward, and clusters are left out, which save no time.
    """

    forward_gain: Floats
    backward_gain: Floats
    value: Floats
    forward_time: Floats
    backward_time: Floats
    forward_heads: Ints
    backward_heads: Ints
    forward_ranks: Ints
    backward_ranks: Ints
    is_exact: bool

    def that_run(self, heads: int) -> Levels:
        """Only the levels at which every rank runs at least this many heads forward."""
        whole = self.forward_ranks == self.forward_heads.shape[1]
        return self._at((self.forward_heads >= heads).all(axis=1) & (whole | (heads == 0)))

    def in_multiples(self, of: int) -> Levels:
        """Only the levels at which every rank runs a multiple of `of` heads, or all of its heads."""
        counts = np.concatenate([self.forward_heads, self.backward_heads], axis=1)
        return self._at(((counts % of == 0) | (counts == len(self.forward_gain))).all(axis=1))

    def _at(self, levels: Ints | Flags) -> Levels:
        by_level = {name: getattr(self, name)[levels] for name in _BY_LEVEL}
        return replace(self, value=np.ascontiguousarray(self.value[:, levels]), **by_level)

    def operations(self, level: Ints, deadline: float = math.inf) -> Operations:
        """Operations of the best heads at the level of each class, uint8 [head, rank, class]. level: int64 [class].
        deadline: of time.monotonic(), after which heads are taken that are only likely to be the best.
        """
        heads, ranks, classes = self.forward_gain.shape
        forward, backward = self.forward_heads[level].T, self.backward_heads[level].T  # [rank, class]
        for its_level in np.unique(level[self.backward_ranks[level] < ranks]):
            here = np.flatnonzero(level == its_level)
            counts = self.forward_heads[its_level, 0], self.backward_heads[its_level, 0]
            gains = [gain[:, :, here].reshape(heads, -1) for gain in (self.forward_gain, self.backward_gain)]
            of_forward, of_both = _scores_of_counts(gains[0], gains[1], counts, deadline)
            of_forward, of_both = of_forward.reshape(ranks, -1), of_both.reshape(ranks, -1)
            some, full = (
                np.full(len(here), ran[its_level]) for ran in (self.forward_ranks, self.backward_ranks)
            )
            # of ranks, as if they were heads
            role = best_heads(of_forward, of_both - of_forward, some, full, deadline)
            forward[:, here] *= role >= Operation.FORWARD_ONLY
            backward[:, here] *= role == Operation.FULL
        chosen = best_heads(
            self.forward_gain.reshape(heads, -1),
            self.backward_gain.reshape(heads, -1),
            forward.ravel(),
            backward.ravel(),
            deadline,
        )
        return chosen.reshape(heads, ranks, classes)


def make_levels(
    forward_gain: Floats,
    backward_gain: Floats,
    *,
    forward_cost: float,
    backward_cost: float,
    speed: Floats,
    clusters: bool = False,
    deadline: float = math.inf,
) -> Levels:
    """All levels that differ in what some rank runs. Raises TimeoutError at the deadline, of time.monotonic().

    forward_gain, backward_gain: float64 [head, rank, class].
    forward_cost, backward_cost: of one head's forward, and of its backward on top. speed: float64 [rank].
    clusters: for ranks of one speed, also levels at which only 1, 2, 4, ... of them run anything, or are FULL.
    """
    heads = len(forward_gain)
    levels = _without_values(forward_gain, backward_gain, forward_cost, backward_cost, speed)
    table = best_scores(forward_gain.reshape(heads, -1), backward_gain.reshape(heads, -1), deadline)
    table = table.reshape(heads + 1, heads + 1, *forward_gain.shape[1:])
    values, ranks = [], np.arange(len(speed))
    for forward, backward in zip(levels.forward_heads, levels.backward_heads, strict=True):
        _require_time(deadline)
        values.append(table[forward, backward, ranks].sum(axis=0))
    of_level, running = [*range(len(values))], [(len(speed), len(speed))] * len(values)
    for level in range(len(values)) if clusters else ():
        forward, backward = levels.forward_heads[level, 0], levels.backward_heads[level, 0]
        if sizes := _cluster_sizes(len(speed), forward, backward):
            of_forward = table[forward, 0]
            of_ranks = best_scores(of_forward, table[forward, backward] - of_forward, deadline)
            values += [of_ranks[size] for size in sizes]
            of_level += [level] * len(sizes)
            running += sizes
    forward_ranks, backward_ranks = np.array(running).T
    return replace(
        levels._at(np.array(of_level)),
        value=np.ascontiguousarray(np.stack(values, axis=1)),
        forward_ranks=forward_ranks,
        backward_ranks=backward_ranks,
        is_exact=True,
    )


def estimate_levels(
    forward_gain: Floats, backward_gain: Floats, *, forward_cost: float, backward_cost: float, speed: Floats
) -> Levels:
    """The levels of `make_levels` without clusters. Their values are estimates from above, made in a fraction of the
    time."""
    levels = _without_values(forward_gain, backward_gain, forward_cost, backward_cost, speed)
    value: Floats = np.zeros_like(levels.value)
    for gain, counts in ((forward_gain, levels.forward_heads), (backward_gain, levels.backward_heads)):
        most = np.zeros((len(gain) + 1, *gain.shape[1:]))  # of the best `count` heads, [count, rank, class]
        np.cumsum(-np.sort(-gain, axis=0), axis=0, out=most[1:])
        differing, of_level = np.unique(counts, axis=0, return_inverse=True)
        of_count = np.zeros((len(differing), gain.shape[2]))
        for rank in range(len(speed)):
            of_count += most[differing[:, rank], rank]
        value += np.take(of_count.T, of_level.ravel(), axis=1)
    return replace(levels, value=value)


def _without_values(
    forward_gain: Floats, backward_gain: Floats, forward_cost: float, backward_cost: float, speed: Floats
) -> Levels:
    """The levels at which all ranks run, their values NaN."""
    heads = len(forward_gain)
    forward_times, forward_heads = _times(forward_cost, speed, heads)
    backward_times, backward_heads = _times(backward_cost, speed, heads)
    forward, backward = np.broadcast_arrays(forward_heads[:, None], backward_heads)
    runs = np.stack([forward, np.minimum(forward, backward)], axis=2).reshape(-1, 2, len(speed))
    # A longer backward that no rank can use is no level of its own.
    first = np.sort(np.unique(runs, axis=0, return_index=True)[1])
    i, j = np.divmod(first, len(backward_times))
    every = np.full(len(first), len(speed))
    return Levels(
        forward_gain,
        backward_gain,
        value=np.full((forward_gain.shape[2], len(first)), np.nan),
        forward_time=forward_times[i],
        backward_time=backward_times[j],
        forward_heads=runs[first, 0],
        backward_heads=runs[first, 1],
        forward_ranks=every,
        backward_ranks=every,
        is_exact=False,
    )


def _require_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError


def _cluster_sizes(ranks: int, forward: int, backward: int) -> list[tuple[int, int]]:
    """Numbers of ranks that run any heads, and of ranks with FULL heads, that are worth trying besides all ranks."""
    if not forward:
        return []
    sizes = sorted({*(1 << power for power in range(ranks.bit_length())), ranks})
    if not backward:  # no rank has FULL heads, whatever the number says
        return [(size, size) for size in sizes if size < ranks]
    return [(some, full) for some in sizes for full in sizes if full <= some and full < ranks]


def _times(cost: float, speed: Floats, heads: int) -> tuple[Floats, Ints]:
    """Times, float64 [time], at which some rank finishes a head, and how many each rank has then, [time, rank]."""
    if cost == 0:  # takes no time, but may still send messages or keep activations
        return np.zeros(heads + 1), np.repeat(np.arange(heads + 1)[:, None], len(speed), axis=1)
    finished = np.arange(heads + 1)[:, None] * cost / speed
    times = np.unique(finished)
    # Float error makes no times of its own.
    keep = np.append(np.diff(times) > BUDGET_EPSILON * times[-1], True)
    counts = np.floor(times[keep, None] * speed / cost + BUDGET_EPSILON * heads)
    return times[keep], np.minimum(counts, heads).astype(np.int64)


def best_scores(forward_gain: Floats, backward_gain: Floats, deadline: float = math.inf) -> Floats:
    """The most that exactly `forward` heads give if `full` of them are FULL: float64 [forward, full, group].

    forward_gain, backward_gain: float64 [head, group]. -inf where full > forward. Heads are added one by one, and
    each is SHORTCUT, FORWARD_ONLY or FULL. Raises TimeoutError at the deadline, of time.monotonic().
    """
    heads, groups = forward_gain.shape
    result = np.empty((heads + 1, heads + 1, groups))
    for chunk in _chunks(heads, groups):
        _require_time(deadline)
        result[:, :, chunk] = _score_table(forward_gain[:, chunk], backward_gain[:, chunk])
    return result


def best_heads(
    forward_gain: Floats, backward_gain: Floats, forward: Ints, full: Ints, deadline: float = math.inf
) -> Operations:
    """Operations uint8 [head, group] that reach best_scores[forward, full] in each group; counts int64 [group].

    deadline: of time.monotonic(), after which `likely_heads` will do.
    """
    heads, groups = forward_gain.shape
    result = np.empty((heads, groups), dtype=np.uint8)
    for chunk in _chunks(heads, groups):
        if time.monotonic() > deadline:
            rest = slice(chunk.start, groups)
            counts = forward[rest], full[rest]
            result[:, rest] = likely_heads(forward_gain[:, rest], backward_gain[:, rest], *counts)
            break
        size = chunk.stop - chunk.start
        last = np.zeros((heads, heads + 1, heads + 1, size), dtype=np.uint8)
        _score_table(forward_gain[:, chunk], backward_gain[:, chunk], last)
        group = np.arange(size)
        forward_left, full_left = forward[chunk].copy(), full[chunk].copy()
        for head in reversed(range(heads)):
            operation = last[head, forward_left, full_left, group]
            result[head, chunk] = operation
            forward_left -= operation >= Operation.FORWARD_ONLY
            full_left -= operation == Operation.FULL
    return result


def likely_heads(forward_gain: Floats, backward_gain: Floats, forward: Ints, full: Ints) -> Operations:
    """As `best_heads`, but in a fraction of the time and not always the best: the heads with the largest total gain
    are FULL, and of the others those with the largest forward gain FORWARD_ONLY."""
    is_full = places(forward_gain + backward_gain) < full
    is_running = places(np.where(is_full, np.inf, forward_gain)) < forward
    chosen = np.where(
        is_full, Operation.FULL, np.where(is_running, Operation.FORWARD_ONLY, Operation.SHORTCUT)
    )
    return np.asarray(chosen, dtype=np.uint8)


def _scores_of_counts(
    forward_gain: Floats, backward_gain: Floats, counts: tuple[int, int], deadline: float
) -> tuple[Floats, Floats]:
    """What `counts[0]` FORWARD_ONLY heads give, and what they give if `counts[1]` of them are FULL: float64 [group]
    each. After the deadline, with `likely_heads`."""
    try:
        table = best_scores(forward_gain, backward_gain, deadline)
        return table[counts[0], 0], table[counts]
    except TimeoutError:
        forward, full = (np.full(forward_gain.shape[1], count) for count in counts)
        chosen = likely_heads(forward_gain, backward_gain, forward, full)
        of_all = np.where(chosen >= Operation.FORWARD_ONLY, forward_gain, 0.0).sum(axis=0)
        return of_all, of_all + np.where(chosen == Operation.FULL, backward_gain, 0.0).sum(axis=0)


def _score_table(forward_gain: Floats, backward_gain: Floats, last: Operations | None = None) -> Floats:
    """`best_scores` of few groups; writes into `last` [head, forward, full, group] what each head does in the best
    choice among the heads up to it."""
    heads, groups = forward_gain.shape
    whole_gain = forward_gain + backward_gain
    table = np.full((heads + 1, heads + 1, groups), -np.inf)
    table[0, 0] = 0.0
    for head in range(heads):
        for forward in reversed(range(head + 1)):  # so that the table's own rows are those before this head
            before = table[forward, : forward + 1]
            for operation, gain, full in (
                (Operation.FORWARD_ONLY, forward_gain[head], slice(forward + 1)),
                (Operation.FULL, whole_gain[head], slice(1, forward + 2)),
            ):
                candidate, best = before + gain, table[forward + 1, full]
                if last is not None:
                    np.copyto(last[head, forward + 1, full], np.uint8(operation), where=candidate > best)
                np.maximum(best, candidate, out=best)
    return table


def _chunks(heads: int, groups: int) -> list[slice]:
    size = max(1, _CHUNK_BYTES // (8 * (heads + 1) ** 2))
    return [slice(start, min(start + size, groups)) for start in range(0, groups, size)]
