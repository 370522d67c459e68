"""What tensor-parallel ranks send around a branch: the interface of the layouts of tokens, and the one in which every
rank holds every token. `sharded_tokens` is the other.

All ranks of a group know the plan, so each knows who has something to send, and nothing else is sent: forward to and
from ranks with a head that is not SHORTCUT (active), backward to and from those with a FULL head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed

Ranks = tuple[int, ...]
"""Places in the group, in rising order."""

Compute = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class TokenExchange(ABC):
    """A layout of the tokens: what ranks hold between branches, and what they send around a branch. rank: this
    process's place in the group."""

    has_whole_gradients: ClassVar[bool]
    """Whether norms and what follows a branch's sum, which all ranks compute, have whole gradients on each rank."""

    group: distributed.ProcessGroup
    rank: int

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenExchange:
        return self  # process groups cannot be copied

    @abstractmethod
    def split(self, x: Tensor) -> Tensor:
        """What this rank keeps between branches of x [sample, token, channel], which all ranks have."""

    @abstractmethod
    def join(self, x: Tensor) -> Tensor:
        """All tokens on all ranks; undoes `split`."""

    @abstractmethod
    def through(self, x: Tensor, compute: Compute, active: Ranks, full: Ranks) -> Tensor:
        """The sum over the active ranks of what they compute with all tokens of x, as split; backward, the FULL ranks
        get its gradient, and all ranks the sum of theirs.

        compute: of [sample, token, channel]; None on ranks that are not active. What it gives may be overwritten.
        """


@dataclass(frozen=True)
class ReplicatedTokens(TokenExchange):
    """Every rank holds every token: one sum after each branch, one before it backward (Shoeybi et al., 2019, arXiv
    1909.08053); a single sender broadcasts."""

    has_whole_gradients = True

    def split(self, x: Tensor) -> Tensor:
        return x

    def join(self, x: Tensor) -> Tensor:
        return x

    def through(self, x: Tensor, compute: Compute, active: Ranks, full: Ranks) -> Tensor:
        entered: Tensor = _SumBackward.apply(self, full, x)
        own = compute(entered)
        own = torch.zeros_like(entered) if own is None else own
        total: Tensor = _SumForward.apply(self, active, own, entered)
        return total

    def sum(self, tensor: Tensor, senders: Ranks) -> Tensor:
        """Sums the tensor over the group in place; it is zero on ranks that are not senders."""
        if len(senders) > 1:
            distributed.all_reduce(tensor, group=self.group)
        elif senders and self.group.size() > 2 and distributed.get_backend(self.group) == "gloo":
            self._pass_on(tensor, senders[0])
        elif senders:
            sender = distributed.get_global_rank(self.group, senders[0])
            distributed.broadcast(tensor, sender, group=self.group)
        return tensor

    def _pass_on(self, tensor: Tensor, sender: int) -> None:
        """A broadcast along a chain of ranks, each of which passes on a piece while the next one comes, as NCCL does.
        gloo's own is a tree, whose root sends the whole to several ranks."""
        ranks = self.group.size()
        place = (self.rank - sender) % ranks
        before, after = (
            distributed.get_global_rank(self.group, (self.rank + step) % ranks) for step in (-1, 1)
        )
        pieces = tensor.view(-1).tensor_split(_PIECES)
        coming = [distributed.irecv(piece, before, self.group) for piece in pieces] if place > 0 else []
        leaving = []
        for index, piece in enumerate(pieces):
            if coming:
                coming[index].wait()  # type: ignore[union-attr]
            if place < ranks - 1:
                leaving.append(distributed.isend(piece, after, self.group))
        for work in leaving:
            work.wait()  # type: ignore[union-attr]


_PIECES = 8
"""The pieces in which a tensor goes along a chain of ranks."""


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, messages: ReplicatedTokens, full: Ranks, normed: Tensor) -> Tensor:
        ctx.messages, ctx.full = messages, full
        return normed.view_as(normed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # A rank without FULL heads gets zeros here, because autograd fills in for absent gradients.
        return None, None, ctx.messages.sum(gradients[0].contiguous(), ctx.full)


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, messages: ReplicatedTokens, active: Ranks, own: Tensor, entered: Tensor) -> Tensor:
        ctx.mark_dirty(own)
        # Asked for in the backward, so that a block that is to be computed again is so here, on all ranks together:
        # one that computed nothing keeps nothing else, and would not send what the others wait for.
        ctx.save_for_backward(own.new_empty(0))
        return messages.sum(own, active)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        # None for `entered`, which ties its backward to this one on ranks that computed nothing, too.
        return None, None, gradients[0], None
