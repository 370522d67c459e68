"""Messages between tensor-parallel ranks that all hold every token: the layout of one sum after each branch.

Another layout (tokens cut over the ranks, say) is another class with the same `enter` and `leave`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

Ranks = tuple[int, ...]
"""Ranks of the group that have something to send; the others would send zeros."""


@dataclass(frozen=True)
class ReplicatedTokens:
    """Sums over a tensor-parallel group. All of its ranks know the plan, so each knows who has something to send:
    nothing is sent where nobody has, and a single sender broadcasts.

    rank: this process's place in the group.
    """

    group: distributed.ProcessGroup
    rank: int

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplicatedTokens:
        return self  # process groups cannot be copied

    def enter(self, tensors: Sequence[Tensor], ranks: Ranks) -> tuple[Tensor, ...]:
        """The same tensors; in the backward, their gradients are summed over the group.

        ranks: those whose gradient is not zero. The rest of the branch must reach `leave` on every rank.
        """
        entered: tuple[Tensor, ...] = _Enter.apply(self, ranks, *tensors)
        return entered

    def leave(self, own: Tensor, entered: Sequence[Tensor], ranks: Ranks) -> Tensor:
        """The sum of all ranks' `own`, in its place; in the backward, its gradient goes to each rank's.

        entered: what `enter` gave: ties its backward to that of the sum on ranks that computed nothing, too.
        ranks: those whose `own` is not zero.
        """
        total: Tensor = _Leave.apply(self, ranks, own, *entered)
        return total

    def sum(self, tensor: Tensor, ranks: Ranks) -> Tensor:
        """The sum over the group, in the tensor's place. ranks: those whose tensor is not zero."""
        if len(ranks) == 1:
            sender = distributed.get_global_rank(self.group, ranks[0])
            distributed.broadcast(tensor, sender, group=self.group)
        elif ranks:
            distributed.all_reduce(tensor, group=self.group)
        return tensor


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, messages: ReplicatedTokens, ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.messages, ctx.ranks = messages, ranks
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # A rank without FULL heads gets zeros here, because autograd fills in for absent gradients.
        summed = [
            ctx.messages.sum(gradient.contiguous(), ctx.ranks) if needed else None
            for gradient, needed in zip(gradients, ctx.needs_input_grad[2:], strict=True)
        ]
        return None, None, *summed


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, messages: ReplicatedTokens, ranks: Ranks, own: Tensor, *entered: Tensor) -> Tensor:
        ctx.entered = len(entered)
        ctx.mark_dirty(own)
        # Asked for in the backward, so that a block that is to be computed again is so here, on all ranks together:
        # one that computed nothing keeps nothing else, and would not send what the others wait for.
        ctx.save_for_backward(own.new_empty(0))
        return messages.sum(own, ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        return None, None, gradients[0], *[None] * ctx.entered
