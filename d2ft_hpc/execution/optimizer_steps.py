"""Calls before and after the steps of all optimisers of the process, while whoever asked for them lives."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Call = Callable[[Optimizer], None]
_Calls = list[tuple[weakref.ref[Any], Call]]
_before: _Calls = []
_after: _Calls = []


def call_around_steps(owner: object, before: Call, after: Call | None = None) -> None:
    """From now on, as long as `owner` lives, which the calls must not keep alive."""
    _hook_into_optimizers()
    _before.append((weakref.ref(owner), before))
    if after is not None:
        _after.append((weakref.ref(owner), after))


@functools.cache
def _hook_into_optimizers() -> None:
    """Once, and for good: a hook that is removed while torch goes through them breaks the optimizer's step, and the
    garbage collector may end an owner at any time."""
    register_optimizer_step_pre_hook(functools.partial(_call, _before))
    register_optimizer_step_post_hook(functools.partial(_call, _after))


def _call(calls: _Calls, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    calls[:] = [each for each in calls if each[0]() is not None]
    for owner, call in list(calls):
        if owner() is not None:
            call(optimizer)
