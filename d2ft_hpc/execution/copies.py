"""Attributes that an attached module has beside timm's own, and that its copies do not get."""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

from torch import nn

_GETSTATE = "__getstate__"
_LEFT_OUT = "_d2ft_left_out"


def leave_out_of_copies(module: nn.Module, names: Iterable[str]) -> None:
    """Makes `copy.copy`, `copy.deepcopy` and pickle (`torch.save`) leave out these attributes of the instance.

    An average of weights (EMA, SWA), or a module saved whole, is then a plain one that needs nothing of ours.
    """

    left_out = vars(module).setdefault(_LEFT_OUT, {_GETSTATE, _LEFT_OUT})
    left_out.update(names)

    def state(module: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in vars(module).items() if name not in left_out}

    # Python looks this up on the instance, so that the module keeps its class.
    vars(module)[_GETSTATE] = MethodType(state, module)


def copied_state(module: nn.Module) -> dict[str, Any]:
    """The attributes of the instance that a copy gets."""
    getstate = vars(module).get(_GETSTATE)
    return dict(vars(module) if getstate is None else getstate())
