"""Prices of limited resources: at the right prices, classes that decide each for itself together just fit the
limits."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2ft_hpc.planning.arrays import Flags, Floats, Ints
from d2ft_hpc.planning.highs import LinearProgram

RELATIVE_GAP = 2.5e-5
"""A choice that is proved to be this near its optimum is good enough, if nothing else is said."""

ROUNDING = 1e-12
"""Relative difference that sums of the same numbers may have in another order."""

_ROUNDS = 100  # of closing in on a price; ten are usual
_LATE_ROUNDS = 2  # after which the price of a single limit will do, where time is short
_TRIAL_SCALES = (0.7, 0.85, 1.0, 1.2, 1.4)  # of first prices, to find options that may be worth it
_SAFE_SCALES = (1.7, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, 20.0, 50.0)  # until a choice fits


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

    def for_all(self) -> Flags:
        """Which options all classes may have at once, bool [option]."""
        classes = np.bincount(self.group, minlength=len(self.most))
        return np.asarray((self.use[:, None] * classes <= self.most).all(axis=1))


def scarce(limits: Sequence[Limit]) -> list[Limit]:
    """The limits on what options use, without duplicates."""
    limits = [limit for limit in limits if np.isfinite(limit.most).all() and limit.use.max() > 0]
    by_content = {(each.use.tobytes(), each.group.tobytes(), each.most.tobytes()): each for each in limits}
    return list(by_content.values())


def less_price(value: Floats, limits: Sequence[Limit], prices: Sequence[Floats]) -> Floats:
    """Value less price, float64 [class, option]."""
    if not limits:
        return value
    of_class = np.stack([price[limit.group] for limit, price in zip(limits, prices, strict=True)], axis=1)
    paid = np.any(of_class, axis=0)
    return value - of_class[:, paid] @ np.stack([limit.use for limit in limits])[paid]


def independent_groups(classes: int, limits: Sequence[Limit]) -> Ints:
    """Groups of classes that no limit couples, int64 [class]: the limits' own groups if all limits have the same,
    else one group."""
    if any(not np.array_equal(limit.group, limits[0].group) for limit in limits[1:]) or not limits:
        return np.zeros(classes, dtype=np.int64)
    return limits[0].group


def bounds_of(value: Floats, limits: Sequence[Limit], prices: Sequence[Floats]) -> Floats:
    """What the prices prove for each independent group, float64 [group]."""
    group = independent_groups(len(value), limits)
    bounds: Floats = np.bincount(group, less_price(value, limits, prices).max(axis=1)).astype(np.float64)
    for limit, price in zip(limits, prices, strict=True):
        worth = price * np.where(price > 0, limit.most, 0.0)
        bounds = bounds + (worth if len(bounds) > 1 else worth.sum())
    return bounds


def price_of_one(value: Floats, limit: Limit, deadline: float = math.inf) -> tuple[list[Floats], Ints]:
    """The best prices of a single limit, and a choice that fits. It misses the optimum by no more than the unused
    budget is worth.

    deadline: of time.monotonic(), after which prices that are near the best will do.

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
    for round_ in range(_ROUNDS):
        if not open_.any() or (round_ >= _LATE_ROUNDS and time.monotonic() > deadline):
            break
        slope = (over_worth - under_worth)[open_] / (over_use - under_use)[open_]
        price[open_] = slope
        option = less_price(value, [limit], [price]).argmax(axis=1)
        worth, use = totals(option)
        known = under_worth - price * under_use
        open_ &= worth - price * use > known + ROUNDING * (np.abs(under_worth) + price * over_use)
        fits = use <= limit.most
        for side, now in ((fits, under), (~fits, over)):
            mine = (side & open_)[limit.group]
            now[mine] = option[mine]
        under_worth, under_use = np.where(fits & open_, (worth, use), (under_worth, under_use))
        over_worth, over_use = np.where(~fits & open_, (worth, use), (over_worth, over_use))

    # At the right price `over` is as good as `under` in every class: take `over` in as many as fit.
    step = np.where(price[limit.group] > 0, limit.use[over] - limit.use[under], 0.0)
    steps = np.flatnonzero(step > 0)
    steps = steps[np.argsort(limit.group[steps], kind="stable")]
    spent = np.cumsum(step[steps])
    before = np.concatenate([[0.0], spent])[np.searchsorted(limit.group[steps], limit.group[steps])]
    steps = steps[spent - before <= limit.left(under)[limit.group[steps]]]
    under[steps] = over[steps]
    return [price], under


def prices_of_several(
    value: Floats, limits: Sequence[Limit], deadline: float, *, solve: bool = True
) -> tuple[list[Floats], Ints]:
    """The best prices of several limits, and a choice that fits.

    A linear program over a pool of options finds prices; options that beat the pool at these prices join it, until
    there are none (column generation).

    deadline: of time.monotonic(), after which the best prices so far will do. solve: with the linear program; without,
        multiples of first prices will do.
    """
    classes = np.arange(len(value))
    if not limits:
        return [], value.argmax(axis=1)
    first = _first_prices(value, limits, deadline)
    pool = np.zeros(value.shape, dtype=bool)
    pool[:, 0] = True
    prices, best = first, math.inf
    option, worth = np.zeros(len(value), dtype=np.int64), -math.inf
    pairs = itertools.product(_TRIAL_SCALES, repeat=min(2, len(limits)))
    for scales in (
        *((*pair, *[1.0] * (len(limits) - len(pair))) for pair in pairs),
        *([scale] * len(limits) for scale in _SAFE_SCALES),
    ):
        if scales[0] in _SAFE_SCALES and math.isfinite(worth):
            break
        if math.isfinite(best) and time.monotonic() > deadline:
            return prices, option
        trial = [price * factor for price, factor in zip(first, scales, strict=True)]
        tried = less_price(value, limits, trial).argmax(axis=1)
        pool[classes, tried] = True
        bound = float(bounds_of(value, limits, trial).sum())
        if bound < best:
            best, prices = bound, trial
        its_worth = float(value[classes, tried].sum())
        if its_worth > worth and all((limit.left(tried) >= 0).all() for limit in limits):
            option, worth = tried, its_worth

    if not solve:
        return prices, option
    unit = np.abs(value[pool]).max() or 1.0
    groups = [len(limit.most) for limit in limits]
    program = LinearProgram(
        np.concatenate([np.ones(len(value)), np.full(sum(groups), -math.inf)]),
        np.concatenate([np.ones(len(value)), *[limit.most for limit in limits]]),
    )
    its_class, its_option = newcomers = np.nonzero(pool)
    while True:
        program.add(value[newcomers] / unit, *entries(len(value), limits, *newcomers))
        solution = program.solve(deadline - time.monotonic())
        if solution.duals is None or solution.values is None:
            return prices, option
        duals = np.maximum(solution.duals[len(value) :], 0.0) * unit
        trial = np.split(duals, np.cumsum(groups)[:-1])
        bound = float(bounds_of(value, limits, trial).sum())
        if bound < best:
            best, prices = bound, trial
        whole = solution.values > 1 - 1e-6
        option = np.zeros(
            len(value), dtype=np.int64
        )  # classes that the program splits between options run nothing
        option[its_class[whole]] = its_option[whole]
        wanted = less_price(value, limits, trial).argmax(axis=1)
        is_new = ~pool[classes, wanted]
        if best - solution.bound * unit <= 1e-7 * abs(best) or not is_new.any():
            return prices, option
        newcomers = classes[is_new], wanted[is_new]
        pool[newcomers] = True
        its_class, its_option = np.append(its_class, newcomers[0]), np.append(its_option, newcomers[1])


def _first_prices(value: Floats, limits: Sequence[Limit], deadline: float) -> list[Floats]:
    """One price for all limits of a group together, each limit weighted by its scarcity."""
    group = independent_groups(len(value), limits)
    classes = np.bincount(group)
    scarcity = [len(value) / (limit.most.sum() or 1.0) for limit in limits]
    use = np.sum([limit.use * scarce for limit, scarce in zip(limits, scarcity, strict=True)], axis=0)
    (price,), _ = price_of_one(value, Limit(use, group, len(limits) * classes.astype(np.float64)), deadline)
    return [
        scarce * (price if len(price) > 1 else np.full(len(limit.most), price[0]))
        for limit, scarce in zip(limits, scarcity, strict=True)
    ]


def entries(
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
