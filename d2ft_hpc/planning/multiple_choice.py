"""One option for every class, the best that limits allow: the problem behind all plans with a structure.

A class is what must be decided (a row of a block, or a row), an option is one of its levels or depths. The way to
the optimum has three steps:

1. *Prices.* Give every limited resource a price and let each class take the option with the largest value less
   price. If the prices are right, what they take together just fits. Any prices prove a bound: value less price,
   summed over the classes, plus the worth of the limits at those prices.
2. *Fill.* Start from a choice that fits and take the best single changes until none fits any more.
3. *Core.* An option that loses more at the prices than the gap between 1 and 2 is in no better choice. HiGHS
   decides among the few that are left, and what it proves holds for all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from d2ft_hpc.planning.arrays import Floats, Ints
from d2ft_hpc.planning.highs import OPTIMAL, Rows, maximise_integer
from d2ft_hpc.planning.prices import (
    RELATIVE_GAP,
    ROUNDING,
    Limit,
    bounds_of,
    entries,
    independent_groups,
    less_price,
    price_of_one,
    prices_of_several,
)

_EXCHANGES = 20
_EXCHANGE_OPTIONS = 300
# Undecided ones: HiGHS settles this many in milliseconds, or overshoots its time by no more.
_CORE_OPTIONS = 3_000
_CORE_SECONDS = 0.5


@dataclass(frozen=True, eq=False)
class Choice:
    """option: int64 [class]. value: its sum. bound: no choice within the limits is worth more.

    prices: float64 [group] for each limit (`prices.bounds_of` says what they prove).
    """

    option: Ints
    value: float
    bound: float
    prices: list[Floats]
    status: str


def share_of_time(deadline: float, parts: int) -> float:
    """The deadline of the next part if this many parts are still to be done by `deadline`, of time.monotonic()."""
    now = time.monotonic()
    return now + (deadline - now) / parts


def choose(
    value: Floats,
    limits: Sequence[Limit],
    *,
    deadline: float,
    relative_gap: float = RELATIVE_GAP,
    search: bool = True,
) -> Choice:
    """Maximise the value of the options taken. The same input gives the same choice, unless time runs out.

    value: float64 [class, option]; option 0 fits in all classes. deadline: of time.monotonic(); if it passes, the best
        choice so far is taken, or the best option that all classes can have at once.
    relative_gap: a choice that is proved to be this near its optimum is good enough.
    search: with HiGHS; without, first prices and filling will do.
    """
    prices = [np.zeros(len(limit.most)) for limit in limits]
    scarce = [i for i, limit in enumerate(limits) if not limit.for_all().all()]
    some = [_rounded(limits[i]) for i in scarce]
    for limit in some:
        alone_too_much = limit.use > limit.most[:, None]  # [group, option]
        if alone_too_much.any():
            value = np.where(alone_too_much[limit.group], -np.inf, value)
    if len(some) == 1:
        its_prices, option = price_of_one(value, some[0], deadline)
    elif time.monotonic() > deadline:
        its_prices, option = [np.zeros(len(limit.most)) for limit in some], _one_for_all(value, some)
    else:
        its_prices, option = prices_of_several(value, some, deadline, solve=search)
        if time.monotonic() > deadline:
            option = max(option, _one_for_all(value, some), key=lambda each: worth_of(value, each))
    for i, price in zip(scarce, its_prices, strict=True):
        prices[i] = price
    option = _fill(value, some, option, deadline)
    if len(some) == 1 and len(some[0].most) == 1 and time.monotonic() <= deadline:
        option = _exchange(value, some[0], float(its_prices[0][0]), option)
    worth = worth_of(value, option)
    bound = max(worth, float(bounds_of(value, some, its_prices).sum()))
    status = OPTIMAL
    if worth < bound * (1 - relative_gap) and time.monotonic() > deadline:
        status = "prices: time limit"
    elif worth < bound * (1 - relative_gap):
        until = deadline if search else -math.inf
        option, bound, status = _decide_core(value, some, its_prices, option, until, relative_gap)
        option = _fill(value, some, option, deadline)
        worth = worth_of(value, option)
    return Choice(option, worth, max(bound, worth), prices, status)


def _one_for_all(value: Floats, limits: Sequence[Limit]) -> Ints:
    """The best option that all classes can have at once. Finding it takes no longer than a sum."""
    fits = np.ones(value.shape[1], dtype=bool)
    for limit in limits:
        fits &= limit.for_all()
    return np.full(len(value), int(np.where(fits, value.sum(axis=0), -np.inf).argmax()))


def _rounded(limit: Limit) -> Limit:
    """The limit with float error granted. If all uses are whole multiples of the smallest use, it is rounded down to
    such a multiple, since no option can use the rest."""
    most = limit.most
    unit = limit.use[limit.use > 0].min(initial=np.inf)
    multiples = limit.use / unit
    if np.abs(multiples - np.rint(multiples)).max() <= ROUNDING * multiples.max():
        most = np.floor(most / unit + 10 * ROUNDING * multiples.max()) * unit
    return replace(limit, most=most + ROUNDING * np.maximum(most, limit.use.max()))


def worth_of(value: Floats, option: Ints) -> float:
    """The sum of the values float64 [class, option] of the options int64 [class]."""
    return float(value[np.arange(len(value)), option].sum())


def _fill(value: Floats, limits: Sequence[Limit], option: Ints, deadline: float) -> Ints:
    """Changes single classes to better options, the largest gain first, until the limits allow no change or time is
    up."""
    option = option.copy()
    classes = np.arange(len(value))
    if limits:  # where a class's groups are among those of all limits, [class, limit]
        first = np.cumsum([0, *[len(limit.most) for limit in limits[:-1]]])
        place = np.stack([limit.group for limit in limits], axis=1) + first
    for _ in range(len(value)):
        if time.monotonic() > deadline:
            break
        gain = value - value[classes, option][:, None]
        left = [limit.left(option) for limit in limits]
        for limit, its_left in zip(limits, left, strict=True):
            gain[limit.use > (its_left[limit.group] + limit.use[option])[:, None]] = -np.inf
        best = gain.argmax(axis=1)
        gains = gain[classes, best]
        order = np.flatnonzero(gains > ROUNDING * np.abs(value[classes, option]))
        if not len(order):
            break
        if not limits:
            return np.asarray(best)
        extra = np.stack([limit.use[best] - limit.use[option] for limit in limits], axis=1)  # [class, limit]
        every_left = np.concatenate(left)
        for index in order[np.argsort(-gains[order], kind="stable")]:
            after = every_left[place[index]] - extra[index]
            if after.min() >= 0:
                option[index] = best[index]
                every_left[place[index]] = after
    return option


def _exchange(value: Floats, limit: Limit, price: float, option: Ints) -> Ints:
    """Changes two classes at once as long as that gains: one takes less so that another fits. For a single group. It
    looks only at changes that lose little at the price.
    """
    option = option.copy()
    classes = np.arange(len(value))
    for _ in range(_EXCHANGES):
        gain = value - value[classes, option][:, None]
        extra = limit.use - limit.use[option][:, None]
        reduced = np.where(gain != 0, gain - price * extra, -np.inf).ravel()
        count = min(_EXCHANGE_OPTIONS, reduced.size)
        places = np.sort(np.argpartition(-reduced, count - 1)[:count])
        places = places[np.isfinite(reduced[places])]
        its_class, its_option = np.divmod(places, value.shape[1])
        its_gain, its_extra = gain.ravel()[places], extra.ravel()[places]
        together = its_gain[:, None] + its_gain
        together[its_extra[:, None] + its_extra > limit.left(option)[0]] = -np.inf
        together[its_class[:, None] == its_class] = -np.inf
        best = int(together.argmax()) if together.size else 0
        if not together.size or together.flat[best] <= ROUNDING * np.abs(value[:, 0]).max(initial=1.0):
            break
        pair = np.array(divmod(best, len(places)))
        option[its_class[pair]] = its_option[pair]
    return option


def _decide_core(
    value: Floats,
    limits: Sequence[Limit],
    prices: Sequence[Floats],
    option: Ints,
    deadline: float,
    relative_gap: float,
) -> tuple[Ints, float, str]:
    """The best choice among the options that a better choice than `option` can have; a bound, and how the search
    ended."""
    classes = np.arange(len(value))
    group = independent_groups(len(value), limits)
    bounds = bounds_of(value, limits, prices)
    bound = float(bounds.sum())
    gap = bounds - np.bincount(group, value[classes, option], len(bounds))
    reduced = less_price(value, limits, prices)
    loss = reduced.max(axis=1, keepdims=True) - reduced
    loss[classes, option] = 0.0
    core = loss <= (gap + 1e-8 * np.abs(bounds))[group, None]
    is_complete = np.count_nonzero(core) <= _CORE_OPTIONS + len(value)
    if not is_complete:
        core &= loss < np.partition(loss[core], _CORE_OPTIONS + len(value))[_CORE_OPTIONS + len(value)]
        core[classes, option] = True

    undecided = np.flatnonzero(core.sum(axis=1) > 1)
    its_class, its_option = np.nonzero(core[undecided])
    decided = np.ones(len(value), dtype=bool)
    decided[undecided] = False
    fixed = [np.bincount(x.group[decided], x.use[option[decided]], len(x.most)) for x in limits]
    here = [Limit(limit.use, limit.group[undecided], limit.most) for limit in limits]
    most = [limit.most - used for limit, used in zip(limits, fixed, strict=True)]
    gain = value[undecided[its_class], its_option] - value[undecided, option[undecided]][its_class]
    unit = max(abs(bound), 1e-300) / len(value)
    column, row, use = entries(len(undecided), here, its_class, its_option)
    one_each = np.ones(len(undecided))
    solution = maximise_integer(
        gain / unit,
        Rows(
            row,
            column,
            use,
            lower=np.concatenate([one_each, *[np.full(len(limit.most), -math.inf) for limit in here]]),
            upper=np.concatenate([one_each, *most]),
        ),
        seconds=min(_CORE_SECONDS, deadline - time.monotonic()),
        absolute_gap=relative_gap / 2 * len(value),
        relative_gap=0.0,
    )
    worth = worth_of(value, option)
    if is_complete:
        bound = min(bound, worth + max(0.0, solution.bound) * unit)
    if solution.values is None:
        return option, bound, f"prices: {solution.status}"
    taken = solution.values > 0.5
    better = option.copy()
    better[undecided[its_class[taken]]] = its_option[taken]
    if worth_of(value, better) < worth or any((limit.left(better) < 0).any() for limit in limits):
        return option, bound, "prices" if solution.status == OPTIMAL else f"prices: {solution.status}"
    is_partial = solution.status == OPTIMAL and not is_complete
    return better, bound, "best of the most promising options" if is_partial else solution.status
