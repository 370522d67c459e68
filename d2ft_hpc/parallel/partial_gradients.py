"""Gradients of which each tensor-parallel rank computes a part, summed in one message a block and step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from d2ft_hpc.execution.gradients import Owners, stand_ins
from d2ft_hpc.parallel.token_exchange import Ranks, TokenExchange


@dataclass
class StepSum:
    """The gradients of one block in a step that each rank has a part of only, kept until all of them are there.

    slots: micro-batches of a step that train the block. alone: in some of them, one rank runs it alone.
    """

    slots: int = 1
    alone: bool = False
    kept: dict[int, Tensor] = field(default_factory=dict)
    """Gradients by slot, so that a micro-batch that runs again does not count twice."""

    def add(self, slot: int | None, own: Tensor) -> Tensor | None:
        """This rank's part over the step; None until its last micro-batch."""
        if slot is None or self.slots == 1:
            return own
        self.kept[slot] = own.float()
        if len(self.kept) < self.slots:
            return None
        parts = [self.kept.pop(each) for each in sorted(self.kept)]
        return torch.stack(parts).sum(dim=0).to(own.dtype)


@dataclass(frozen=True)
class PartialGradients:
    """Those parameters of a block whose gradient on each rank is a part of the sum, in one micro-batch.

    owners: of the parameters. slot: of the micro-batch. whole: how many of the parameters, the last ones, have the
    sum as their gradient on every rank in this micro-batch; that of the group's first rank counts.
    """

    owners: Owners
    step: StepSum
    slot: int | None
    whole: int = 0


@contextmanager
def whole_gradients(
    messages: TokenExchange, partial: PartialGradients, full: Ranks, x: Tensor
) -> Iterator[Tensor]:
    """Inside, a block computes with stand-ins of those parameters whose gradient on a rank is only a part of the sum.

    The backward of the last micro-batch that trains the block sums their gradients of the step over the group in one
    message; micro-batches before it give zeros. Yields what stands in for the block's input x. Its gradient brings
    every rank to that message, also a rank that uses none of the parameters."""
    if not (partial.owners and full and torch.is_grad_enabled()):
        yield x
        return
    parameters = [kept[name] for kept, name in partial.owners]
    x, *summed = _SumGradients.apply(messages, partial, x, *parameters)
    with stand_ins(partial.owners, summed):
        yield x


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, messages: TokenExchange, partial: PartialGradients, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.messages, ctx.partial = messages, partial
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_x, *own = gradients
        messages, partial = ctx.messages, ctx.partial
        if messages.rank > 0:
            counted = len(own) - partial.whole
            own = [*own[:counted], *(torch.zeros_like(each) for each in own[counted:])]
        flat = partial.step.add(partial.slot, torch.cat([gradient.flatten() for gradient in own]))
        if flat is None:
            return None, None, of_x, *(torch.zeros_like(gradient) for gradient in own)  # engines wait for one
        distributed.all_reduce(flat, group=messages.group)
        parts = flat.split([gradient.numel() for gradient in own])
        return None, None, of_x, *(part.view_as(each) for part, each in zip(parts, own, strict=True))
