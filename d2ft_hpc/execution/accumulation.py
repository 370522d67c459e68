"""Gradients that are added, as soon as they are computed, to what is kept of them, instead of being handed to autograd:
one pass over memory in place of three. Megatron-LM calls it fused accumulation of gradients.

Whoever computes a gradient finds where to add it by `accumulator_of`, adds it, and gives autograd None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTE = "_d2ft_accumulator"


class Accumulator:
    """Where gradients of one parameter, or of a part of it, add up."""

    def __init__(self, place: Tensor, whole: Accumulator | None = None) -> None:
        """place: of the parameter's shape. whole: of the flat parameter that this one is part of."""
        self.place = place
        self._whole = whole
        self.got_any = False
        """Whether something was added."""

    def take(self) -> Tensor:
        """The place, for what the caller adds to it now."""
        self.got_any = True
        if self._whole is not None:
            self._whole.got_any = True
        return self.place


def accumulator_of(parameter: Tensor | None) -> Accumulator | None:
    """None where gradients go through autograd."""
    found: Accumulator | None = getattr(parameter, _ATTRIBUTE, None)
    return found


def let_accumulate(parameter: Tensor, accumulator: Accumulator) -> None:
    """Gradients of `parameter` are added there from now on by those who know how."""
    setattr(parameter, _ATTRIBUTE, accumulator)


def add(gradients: Sequence[Tensor | None], accumulators: Sequence[Accumulator | None]) -> None:
    """Adds the gradients that there are to the places that there are."""
    pairs = [
        (accumulator.take(), gradient)
        for accumulator, gradient in zip(accumulators, gradients, strict=True)
        if accumulator is not None and gradient is not None
    ]
    if pairs:
        torch._foreach_add_(*map(list, zip(*pairs, strict=True)))


def take_apart(flat: Tensor, views: Sequence[Tensor], accumulators: Sequence[Accumulator]) -> list[Tensor]:
    """Parts of a flat parameter, whose gradients autograd adds to their own places. views: of its values."""
    return list(_TakeApart.apply(flat, accumulators, *views))


class _TakeApart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, accumulators: Sequence[Accumulator], *views: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.accumulators = accumulators
        ctx.set_materialize_grads(False)
        return tuple(view.view_as(view) for view in views)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        add(gradients, ctx.accumulators)
        return (None,) * (2 + len(gradients))
