"""Levels: how many heads the ranks of one stage run on a row of a block, so that all of them finish together.

Tensor-parallel ranks meet after every branch of every block, so only the slowest rank's work counts. A level is a
pair of times, for the forward and for the backward; each rank runs as many heads forward, and as many of them
backward, as it gets done in those times. Which heads these are is then each rank's own small choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from d2ft_hpc.planning.plan import Operation
from d2ft_hpc.planning.problem import BUDGET_EPSILON, Floats, Ints

_CHUNK_BYTES = 4_000_000  # of a table, so that it stays in the processor's cache


@dataclass(frozen=True, eq=False)
class Levels:
    """The levels of one stage, and what each gives in each class. A class is one (row, block).

    forward_gain, backward_gain: float64 [head, rank, class], the gains of every rank's heads.
    value: float64 [class, level], the largest sum of gains, over all ranks.
    forward_time, backward_time: float64 [level]; level 0 runs least.
    forward_heads, backward_heads: int64 [level, rank], heads that run forward, and those of them that are FULL.
    """

    forward_gain: Floats
    backward_gain: Floats
    value: Floats
    forward_time: Floats
    backward_time: Floats
    forward_heads: Ints
    backward_heads: Ints

    def that_run(self, heads: int) -> Levels:
        """Only the levels at which every rank runs at least so many heads forward."""
        keep = np.flatnonzero((self.forward_heads >= heads).all(axis=1))
        return replace(
            self,
            value=np.ascontiguousarray(self.value[:, keep]),
            forward_time=self.forward_time[keep],
            backward_time=self.backward_time[keep],
            forward_heads=self.forward_heads[keep],
            backward_heads=self.backward_heads[keep],
        )

    def operations(self, level: Ints) -> npt.NDArray[np.uint8]:
        """The best heads at the level of each class, uint8 [head, rank, class]; level: int64 [class]."""
        heads, ranks, classes = self.forward_gain.shape
        chosen = best_heads(
            self.forward_gain.reshape(heads, -1),
            self.backward_gain.reshape(heads, -1),
            self.forward_heads[level].T.ravel(),
            self.backward_heads[level].T.ravel(),
        )
        return chosen.reshape(heads, ranks, classes)


def make_levels(
    forward_gain: Floats, backward_gain: Floats, *, forward_cost: float, backward_cost: float, speed: Floats
) -> Levels:
    """All levels that differ in what some rank runs.

    forward_gain, backward_gain: float64 [head, rank, class].
    forward_cost, backward_cost: of one head's forward, and of its backward on top. speed: float64 [rank].
    """
    heads = len(forward_gain)
    forward_times, forward_heads = _times(forward_cost, speed, heads)
    backward_times, backward_heads = _times(backward_cost, speed, heads)
    pairs, seen = [], set()
    for i in range(len(forward_times)):
        for j in range(len(backward_times)):
            runs = (forward_heads[i], np.minimum(forward_heads[i], backward_heads[j]))
            key = np.concatenate(runs).tobytes()
            if key not in seen:  # a longer backward that no rank can use is no level of its own
                seen.add(key)
                pairs.append((i, j, *runs))
    table = best_scores(forward_gain.reshape(heads, -1), backward_gain.reshape(heads, -1))
    table = table.reshape(heads + 1, heads + 1, *forward_gain.shape[1:])
    value = np.empty((len(pairs), forward_gain.shape[2]))
    ranks = np.arange(len(speed))
    for level, (_, _, forward, backward) in enumerate(pairs):
        if (forward == forward[0]).all() and (backward == backward[0]).all():
            table[forward[0], backward[0]].sum(axis=0, out=value[level])
        else:
            table[forward, backward, ranks].sum(axis=0, out=value[level])
    return Levels(
        forward_gain,
        backward_gain,
        value=np.ascontiguousarray(value.T),
        forward_time=forward_times[[i for i, *_ in pairs]],
        backward_time=backward_times[[j for _, j, *_ in pairs]],
        forward_heads=np.array([forward for *_, forward, _ in pairs]),
        backward_heads=np.array([backward for *_, backward in pairs]),
    )


def _times(cost: float, speed: Floats, heads: int) -> tuple[Floats, Ints]:
    """Times, float64 [time], at which some rank finishes a head, and how many each rank has then, [time, rank]."""
    if cost == 0:  # takes no time, but may still send messages or keep activations
        return np.zeros(heads + 1), np.repeat(np.arange(heads + 1)[:, None], len(speed), axis=1)
    finished = np.arange(heads + 1)[:, None] * cost / speed
    times = np.unique(finished)
    keep = np.append(
        np.diff(times) > BUDGET_EPSILON * times[-1], True
    )  # float error makes no times of its own
    counts = np.floor(times[keep, None] * speed / cost + BUDGET_EPSILON * heads)
    return times[keep], np.minimum(counts, heads).astype(np.int64)


def best_scores(forward_gain: Floats, backward_gain: Floats) -> Floats:
    """float64 [forward, full, group]: the most that exactly `forward` heads give of which `full` are FULL.

    forward_gain, backward_gain: float64 [head, group]. -inf where full > forward. Heads are added one by one, and
    each is SHORTCUT, FORWARD_ONLY or FULL.
    """
    heads, groups = forward_gain.shape
    result = np.empty((heads + 1, heads + 1, groups))
    for chunk in _chunks(groups, 8 * (heads + 1) ** 2):
        result[:, :, chunk] = _score_table(forward_gain[:, chunk], backward_gain[:, chunk])
    return result


def best_heads(
    forward_gain: Floats, backward_gain: Floats, forward: Ints, full: Ints
) -> npt.NDArray[np.uint8]:
    """Operations uint8 [head, group] that reach best_scores[forward, full] in each group; counts int64 [group]."""
    heads, groups = forward_gain.shape
    result = np.empty((heads, groups), dtype=np.uint8)
    for chunk in _chunks(groups, (heads + 8) * (heads + 1) ** 2):
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


def _score_table(
    forward_gain: Floats, backward_gain: Floats, last: npt.NDArray[np.uint8] | None = None
) -> Floats:
    """`best_scores` of few groups; writes into `last` [head, forward, full, group] what each head does in the best
    choice among the heads up to it."""
    heads, groups = forward_gain.shape
    whole_gain = forward_gain + backward_gain
    table = np.full((heads + 1, heads + 1, groups), -np.inf)
    table[0, 0] = 0.0
    for head in range(heads):
        before = table[: head + 1, : head + 1]
        if_forward, if_full = before + forward_gain[head], before + whole_gain[head]
        for operation, candidate, places in (
            (Operation.FORWARD_ONLY, if_forward, np.s_[1 : head + 2, : head + 1]),
            (Operation.FULL, if_full, np.s_[1 : head + 2, 1 : head + 2]),
        ):
            if last is not None:
                np.copyto(last[head][places], np.uint8(operation), where=candidate > table[places])
            np.maximum(table[places], candidate, out=table[places])
    return table


def _chunks(groups: int, bytes_of_one: int) -> list[slice]:
    size = max(1, _CHUNK_BYTES // bytes_of_one)
    return [slice(start, min(start + size, groups)) for start in range(0, groups, size)]
