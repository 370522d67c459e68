"""Attributes that an attached module has beside timm's own, and that its copies do not get."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn

_GETSTATE = "__getstate__"
_LEFT_OUT = "_d2ft_left_out"


def set_outside_copies(module: nn.Module, own: Mapping[str, Any]) -> None:
    """Sets attributes of the instance, which `copy.copy`, `copy.deepcopy` and pickle (`torch.save`) leave out.

    An average of weights (EMA, SWA), or a module saved whole, is then a plain one that needs nothing of ours.
    """
    vars(module).update(own)
    left_out = vars(module).setdefault(_LEFT_OUT, {_GETSTATE, _LEFT_OUT})
    left_out.update(own)

    def state(module: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in vars(module).items() if name not in left_out}

    # Python looks this up on the instance, so that the module keeps its class.
    vars(module)[_GETSTATE] = MethodType(state, module)


def copied_state(module: nn.Module) -> dict[str, Any]:
    """The attributes of the instance that a copy gets."""
    getstate = vars(module).get(_GETSTATE)
    return dict(vars(module) if getstate is None else getstate())
