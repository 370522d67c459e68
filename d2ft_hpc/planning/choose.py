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

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from d2ft_hpc.planning.highs import OPTIMAL, LinearProgram, Rows, maximise_integer
from d2ft_hpc.planning.problem import Floats, Ints

RELATIVE_GAP = 1e-5
"""A choice that is proved to be this near its optimum is good enough."""

_TRIAL_SCALES = (0.7, 0.85, 1.0, 1.2, 1.4)  # of first prices, to find options that may be worth it
_ROUNDING = 1e-12  # by which sums of the same numbers in another order may differ
_CORE_OPTIONS = (
    3_000  # undecided ones: HiGHS settles so many in milliseconds, or overshoots its time by as little
)
_CORE_SECONDS = 0.5
_PRICE_STEPS = 100


@dataclass(frozen=True, eq=False)
class Limit:
    """The classes of one group may use `most` [group] in all. use: float64 [option], >= 0, 0 for option 0.

    group: int64 [class].
    """

    use: Floats
    group: Ints
    most: Floats

    def used(self, option: Ints) -> Floats:
        """float64 [group]; option: int64 [class]."""
        return np.bincount(self.group, self.use[option], len(self.most)).astype(np.float64)

    def left(self, option: Ints) -> Floats:
        return self.most - self.used(option)


@dataclass(frozen=True, eq=False)
class Choice:
    """option: int64 [class]. value: its sum. bound: no choice within the limits is worth more.

    prices: float64 [group] for each limit. price_bound: the bound that they prove.
    """

    option: Ints
    value: float
    bound: float
    prices: list[Floats]
    price_bound: float
    status: str


def choose(value: Floats, limits: Sequence[Limit], *, deadline: float) -> Choice:
    """Maximise the value of the options taken. The same input gives the same choice, unless time runs out.

    value: float64 [class, option]. deadline: of time.monotonic(); if it passes, the best choice so far is taken.
    """
    prices = [np.zeros(len(limit.most)) for limit in limits]
    scarce = [i for i, limit in enumerate(limits) if _can_be_exceeded(limit)]
    some = [_rounded(limits[i]) for i in scarce]
    of_all_options = value
    for limit in some:
        alone_too_much = limit.use > limit.most[:, None]  # [group, option]
        if alone_too_much.any():
            value = np.where(alone_too_much[limit.group], -np.inf, value)
    if len(some) == 1:
        its_prices, option = _price(value, some[0])
    else:
        its_prices, option = _prices_of_several(value, some, deadline)
    for i, price in zip(scarce, its_prices, strict=True):
        prices[i] = price
    option = _fill(value, some, option)
    worth = _worth(value, option)
    bound = max(worth, float(_bounds(value, some, its_prices).sum()))
    price_bound = max(worth, float(_bounds(of_all_options, some, its_prices).sum()))
    status = OPTIMAL
    if worth < bound * (1 - RELATIVE_GAP):
        option, bound, status = _decide_core(value, some, its_prices, option, deadline)
        option = _fill(value, some, option)
        worth = _worth(value, option)
    return Choice(option, worth, max(bound, worth), prices, price_bound, status)


def _can_be_exceeded(limit: Limit) -> bool:
    classes = np.bincount(limit.group, minlength=len(limit.most))
    return bool((classes * limit.use.max() > limit.most).any())


def _rounded(limit: Limit) -> Limit:
    """The limit with float error granted, and in whole multiples of the smallest use if all uses are such: what is
    left over then helps nobody."""
    most = limit.most
    unit = limit.use[limit.use > 0].min(initial=np.inf)
    multiples = limit.use / unit
    if np.abs(multiples - np.rint(multiples)).max() <= _ROUNDING * multiples.max():
        most = np.floor(most / unit + 10 * _ROUNDING * multiples.max()) * unit
    return replace(limit, most=most + _ROUNDING * np.maximum(most, limit.use.max()))


def _worth(value: Floats, option: Ints) -> float:
    return float(value[np.arange(len(value)), option].sum())


def _less_price(value: Floats, limits: Sequence[Limit], prices: Sequence[Floats]) -> Floats:
    """Value less price, float64 [class, option]."""
    for limit, price in zip(limits, prices, strict=True):
        value = value - price[limit.group, None] * limit.use
    return value


def _independent(classes: int, limits: Sequence[Limit]) -> Ints:
    """Groups of classes that no limit couples, int64 [class]: those of the limits if all have the same, else one."""
    if any(not np.array_equal(limit.group, limits[0].group) for limit in limits[1:]) or not limits:
        return np.zeros(classes, dtype=np.int64)
    return limits[0].group


def _bounds(value: Floats, limits: Sequence[Limit], prices: Sequence[Floats]) -> Floats:
    """What the prices prove for each independent group, float64 [group]."""
    group = _independent(len(value), limits)
    bounds: Floats = np.bincount(group, _less_price(value, limits, prices).max(axis=1)).astype(np.float64)
    for limit, price in zip(limits, prices, strict=True):
        worth = price * np.where(price > 0, limit.most, 0.0)
        bounds = bounds + (worth if len(bounds) > 1 else worth.sum())
    return bounds


def _price(value: Floats, limit: Limit) -> tuple[list[Floats], Ints]:
    """The best prices of a single limit, and a choice that fits and is optimal but for what it leaves unused.

    In each group, two choices close in on the price from both sides: one that fits, and one that does not. The
    price that makes both equally good is tried next; if it brings up none better than the two, it is the right one.
    """
    classes = np.arange(len(value))
    groups = len(limit.most)

    def totals(option: Ints) -> tuple[Floats, Floats]:
        worth = np.bincount(limit.group, value[classes, option], groups).astype(np.float64)
        return worth, limit.used(option)

    under = np.zeros(len(value), dtype=np.int64)
    over = value.argmax(axis=1)
    (under_worth, under_use), (over_worth, over_use) = totals(under), totals(over)
    price = np.zeros(groups)
    open_ = over_use > limit.most
    under = np.where(open_[limit.group], under, over)
    for _ in range(_PRICE_STEPS):  # float error can send the two round in circles; every price proves a bound
        if not open_.any():
            break
        slope = (over_worth - under_worth)[open_] / (over_use - under_use)[open_]
        price[open_] = slope
        option = _less_price(value, [limit], [price]).argmax(axis=1)
        worth, use = totals(option)
        known = under_worth - price * under_use
        open_ &= worth - price * use > known + 1e-13 * np.abs(known)
        fits = use <= limit.most
        for side, now in ((fits, under), (~fits, over)):
            mine = (side & open_)[limit.group]
            now[mine] = option[mine]
        under_worth, under_use = np.where(fits & open_, (worth, use), (under_worth, under_use))
        over_worth, over_use = np.where(~fits & open_, (worth, use), (over_worth, over_use))

    # At the right price `over` is as good as `under` in every class: go over as far as it fits.
    step = np.where(price[limit.group] > 0, limit.use[over] - limit.use[under], 0.0)
    steps = np.flatnonzero(step > 0)
    steps = steps[np.argsort(limit.group[steps], kind="stable")]
    spent = np.cumsum(step[steps])
    before = np.concatenate([[0.0], spent])[np.searchsorted(limit.group[steps], limit.group[steps])]
    steps = steps[spent - before <= limit.left(under)[limit.group[steps]]]
    under[steps] = over[steps]
    return [price], under


def _prices_of_several(value: Floats, limits: Sequence[Limit], deadline: float) -> tuple[list[Floats], Ints]:
    """The best prices of several limits, and a choice that fits.

    A linear program over a pool of options finds prices; options that beat the pool at these prices join it, until
    there are none (column generation).
    """
    classes = np.arange(len(value))
    if not limits:
        return [], value.argmax(axis=1)
    prices = _first_prices(value, limits)
    pool = np.zeros(value.shape, dtype=bool)
    pool[:, 0] = True
    for scale in itertools.product(_TRIAL_SCALES, repeat=min(2, len(limits))):
        scales = (*scale, *[1.0] * (len(limits) - len(scale)))
        trial = [price * factor for price, factor in zip(prices, scales, strict=True)]
        pool[classes, _less_price(value, limits, trial).argmax(axis=1)] = True

    unit = np.abs(value[pool]).max() or 1.0
    groups = [len(limit.most) for limit in limits]
    program = LinearProgram(
        np.concatenate([np.ones(len(value)), np.full(sum(groups), -math.inf)]),
        np.concatenate([np.ones(len(value)), *[limit.most for limit in limits]]),
    )
    its_class, its_option = newcomers = np.nonzero(pool)
    best, option = math.inf, np.zeros(len(value), dtype=np.int64)
    while True:
        program.add(value[newcomers] / unit, *_entries(len(value), limits, *newcomers))
        solution = program.solve(deadline - time.monotonic())
        if solution.duals is None or solution.values is None:
            return prices, option
        duals = np.maximum(solution.duals[len(value) :], 0.0) * unit
        trial = np.split(duals, np.cumsum(groups)[:-1])
        bound = float(_bounds(value, limits, trial).sum())
        if bound < best:
            best, prices = bound, trial
        whole = solution.values > 1 - 1e-6
        option = np.zeros(
            len(value), dtype=np.int64
        )  # classes that the program splits between options run nothing
        option[its_class[whole]] = its_option[whole]
        wanted = _less_price(value, limits, trial).argmax(axis=1)
        is_new = ~pool[classes, wanted]
        if best - solution.bound * unit <= RELATIVE_GAP / 100 * abs(best) or not is_new.any():
            return prices, option
        newcomers = classes[is_new], wanted[is_new]
        pool[newcomers] = True
        its_class, its_option = np.append(its_class, newcomers[0]), np.append(its_option, newcomers[1])


def _first_prices(value: Floats, limits: Sequence[Limit]) -> list[Floats]:
    """One price for all limits of a group together, each weighed by how scarce it is."""
    group = _independent(len(value), limits)
    classes = np.bincount(group)
    scarcity = [len(value) / (limit.most.sum() or 1.0) for limit in limits]
    use = np.sum([limit.use * scarce for limit, scarce in zip(limits, scarcity, strict=True)], axis=0)
    (price,), _ = _price(value, Limit(use, group, len(limits) * classes.astype(np.float64)))
    return [
        scarce * (price if len(price) > 1 else np.full(len(limit.most), price[0]))
        for limit, scarce in zip(limits, scarcity, strict=True)
    ]


def _entries(
    classes: int, limits: Sequence[Limit], its_class: Ints, its_option: Ints
) -> tuple[Ints, Ints, Floats]:
    """Column, row and value of one variable for each of the given options.

    The rows: one for every class, which gets one option, then one for every group of every limit.
    """
    rows, values = [its_class], [np.ones(len(its_class))]
    first = classes
    for limit in limits:
        rows.append(first + limit.group[its_class])
        values.append(limit.use[its_option])
        first += len(limit.most)
    value = np.concatenate(values)
    some = value != 0
    column = np.tile(np.arange(len(its_class)), 1 + len(limits))
    return column[some], np.concatenate(rows)[some], value[some]


def _fill(value: Floats, limits: Sequence[Limit], option: Ints) -> Ints:
    """Changes single classes to options worth more, the largest gain first, while the limits allow any."""
    option = option.copy()
    classes = np.arange(len(value))
    for _ in range(len(value)):
        gain = value - value[classes, option][:, None]
        left = [limit.left(option) for limit in limits]
        for limit, its_left in zip(limits, left, strict=True):
            gain[limit.use > (its_left[limit.group] + limit.use[option])[:, None]] = -np.inf
        best = gain.argmax(axis=1)
        gains = gain[classes, best]
        order = np.flatnonzero(gains > _ROUNDING * np.abs(value[classes, option]))
        if not len(order):
            break
        for index in order[np.argsort(-gains[order], kind="stable")]:
            extra = [float(limit.use[best[index]] - limit.use[option[index]]) for limit in limits]
            places = [(its_left, limit.group[index]) for limit, its_left in zip(limits, left, strict=True)]
            if all(its_left[g] >= use for (its_left, g), use in zip(places, extra, strict=True)):
                option[index] = best[index]
                for (its_left, g), use in zip(places, extra, strict=True):
                    its_left[g] -= use
    return option


def _decide_core(
    value: Floats, limits: Sequence[Limit], prices: Sequence[Floats], option: Ints, deadline: float
) -> tuple[Ints, float, str]:
    """The best choice among options that can be in one better than `option`; a bound, and how it ended."""
    classes = np.arange(len(value))
    group = _independent(len(value), limits)
    bounds = _bounds(value, limits, prices)
    bound = float(bounds.sum())
    gap = bounds - np.bincount(group, value[classes, option], len(bounds))
    reduced = _less_price(value, limits, prices)
    loss = reduced.max(axis=1, keepdims=True) - reduced
    loss[classes, option] = 0.0
    core = loss <= (gap + RELATIVE_GAP / 1000 * np.abs(bounds))[group, None]
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
    column, row, use = _entries(len(undecided), here, its_class, its_option)
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
        absolute_gap=RELATIVE_GAP / 2 * len(value),
        relative_gap=0.0,
    )
    worth = _worth(value, option)
    if is_complete:
        bound = min(bound, worth + max(0.0, solution.bound) * unit)
    if solution.values is None:
        return option, bound, f"prices: {solution.status}"
    taken = solution.values > 0.5
    better = option.copy()
    better[undecided[its_class[taken]]] = its_option[taken]
    if _worth(value, better) < worth or any((limit.left(better) < 0).any() for limit in limits):
        return option, bound, "prices" if solution.status == OPTIMAL else f"prices: {solution.status}"
    return (
        better,
        bound,
        solution.status if is_complete else f"{solution.status} among the most promising levels",
    )
