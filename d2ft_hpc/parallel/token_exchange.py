"""Messages between tensor-parallel ranks: two layouts of the tokens between the branches, with the same methods.

All ranks of a group know the plan, so each knows who has something to send, and nothing else is sent: forward to and
from ranks with a head that is not SHORTCUT (active), backward to and from those with a FULL head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from d2ft_hpc.execution.gradients import Owners, stand_ins

Ranks = tuple[int, ...]
"""Places in the group, in rising order."""

Compute = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class TokenMessages(ABC):
    """What a layout of the tokens sends around a branch. rank: this process's place in the group."""

    group: distributed.ProcessGroup
    rank: int

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenMessages:
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

    @property
    @abstractmethod
    def has_whole_gradients(self) -> bool:
        """Whether what all ranks compute alike, norms and what follows a branch's sum, has whole gradients on each."""


@dataclass(frozen=True)
class ReplicatedTokens(TokenMessages):
    """Every rank holds every token: one sum after each branch, one before it backward (Shoeybi et al., 2019, arXiv
    1909.08053); a single sender broadcasts."""

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

    @property
    def has_whole_gradients(self) -> bool:
        return True

    def sum(self, tensor: Tensor, senders: Ranks) -> Tensor:
        """Over the group, in the tensor's place; of others than the senders it is zero."""
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
"""In which a tensor goes along a chain of ranks."""


@dataclass(frozen=True)
class ShardedTokens(TokenMessages):
    """Between branches every rank holds its own run of each sample's tokens, so that norms, LayerScale, biases and the
    residual are computed once (Korthikanti et al., 2022, arXiv 2205.05198). Only active ranks receive the others'
    tokens and send partial sums, in messages from rank to rank.

    tokens: of a sample. Runs differ by at most one token.
    parts: of a micro-batch's samples. The messages of one are under way while the next is computed.
    """

    tokens: int
    parts: int = 1

    def run(self, rank: int) -> slice:
        """The tokens that a rank holds."""
        ranks = self.group.size()
        return slice(rank * self.tokens // ranks, (rank + 1) * self.tokens // ranks)

    def split(self, x: Tensor) -> Tensor:
        own: Tensor = _Split.apply(self, x)
        return own

    def join(self, x: Tensor) -> Tensor:
        whole: Tensor = _Join.apply(self, x)
        return whole

    def through(self, x: Tensor, compute: Compute, active: Ranks, full: Ranks) -> Tensor:
        flow = _Flow(self, active, full, [len(part) for part in x.tensor_split(min(self.parts, len(x)))])
        # All ranks must take part in the backward, also where nothing here needs a gradient.
        anchor = x.new_empty(0, requires_grad=bool(full))
        ends = []
        for part, own in enumerate(_Begin.apply(flow, x)):
            entered = _Gathered.apply(flow, part, own)
            ends.append(_Sent.apply(flow, part, anchor, compute(entered), entered))
        total: Tensor = _End.apply(flow, anchor, *ends)
        return total

    @property
    def has_whole_gradients(self) -> bool:
        return False

    def gather(self, own: Tensor, receivers: Ranks) -> Callable[[], Tensor | None]:
        """Begins to gather all tokens from all ranks' runs; returns what waits for them and gives them on the
        receivers, None on the others."""
        everyone = range(self.group.size())
        here = self.rank in receivers
        parts = {
            rank: own if rank == self.rank else self._buffer_like(own, rank) for rank in everyone if here
        }
        finish = self._exchange(
            {rank: own.contiguous() for rank in receivers if rank != self.rank},
            {rank: part for rank, part in parts.items() if rank != self.rank},
        )

        def finished() -> Tensor | None:
            finish()
            return torch.cat(list(parts.values()), dim=1) if here else None

        return finished

    def scatter_sum(self, whole: Tensor | None, like: Tensor, senders: Ranks) -> Callable[[], Tensor]:
        """Begins to send the senders' tensors of all tokens; returns what waits for them and gives this rank's run of
        their sum. like: of as many samples and channels."""
        everyone = range(self.group.size())
        here = whole is not None and self.rank in senders
        parts = {rank: self._buffer_like(like, self.rank) for rank in senders if rank != self.rank}
        finish = self._exchange(
            {rank: whole[:, self.run(rank)].contiguous() for rank in everyone if here and rank != self.rank},  # type: ignore[index]
            parts,
        )
        if here:
            parts[self.rank] = whole[:, self.run(self.rank)].contiguous()  # type: ignore[index]

        def finished() -> Tensor:
            finish()
            first, *others = [parts[rank] for rank in senders]  # one order on all ranks
            for other in others:
                first = first + other
            return first

        return finished

    def _buffer_like(self, like: Tensor, rank: int) -> Tensor:
        run = self.run(rank)
        return like.new_empty(like.shape[0], run.stop - run.start, like.shape[2])

    def _exchange(self, to_send: dict[int, Tensor], to_fill: dict[int, Tensor]) -> Callable[[], None]:
        """Begins messages from rank to rank, all at once; returns what waits for them. The keys are places in the
        group."""
        # Receives first: gloo tells a sender that there is room, on the way that its own data would go before.
        operations = [
            distributed.P2POp(operation, tensor, distributed.get_global_rank(self.group, rank), self.group)
            for operation, tensors in ((distributed.irecv, to_fill), (distributed.isend, to_send))
            for rank, tensor in tensors.items()
            if tensor.numel()
        ]
        under_way = distributed.batch_isend_irecv(operations) if operations else []

        def finish() -> None:
            for work in under_way:
                work.wait()

        return finish


@dataclass
class StepSum:
    """The gradients of one block in a step that each rank has a part of only, kept until all of them are there.

    slots: micro-batches of a step that train the block. alone: in some of them, one rank runs it alone.
    """

    slots: int = 1
    alone: bool = False
    kept: dict[int, Tensor] = field(default_factory=dict)
    """By slot, so that a micro-batch that runs again does not count twice."""

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
    messages: TokenMessages, partial: PartialGradients, full: Ranks, x: Tensor
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


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, messages: TokenMessages, partial: PartialGradients, *tensors: Tensor
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


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, messages: ShardedTokens, x: Tensor) -> Tensor:
        ctx.messages = messages
        return x[:, messages.run(messages.rank)].contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        messages = ctx.messages
        return None, messages.gather(gradients[0].contiguous(), tuple(range(messages.group.size())))()


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, messages: ShardedTokens, x: Tensor) -> Tensor:
        ctx.messages = messages
        whole = messages.gather(x, tuple(range(messages.group.size())))()
        assert whole is not None
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # What follows the blocks is computed on every rank, so that each has the whole gradient already.
        messages = ctx.messages
        return None, gradients[0][:, messages.run(messages.rank)].contiguous()


@dataclass
class _Flow:
    """One pass of a micro-batch's parts through what the active ranks compute, forward and then backward.

    samples: of each part. gathers, scatters: of each part, the messages under way in this direction.
    """

    messages: ShardedTokens
    active: Ranks
    full: Ranks
    samples: list[int]
    gathers: dict[int, Callable[[], Tensor | None]] = field(default_factory=dict)
    scatters: dict[int, Callable[[], Tensor]] = field(default_factory=dict)

    def gather(self, own: Sequence[Tensor], receivers: Ranks, order: Sequence[int]) -> None:
        self.gathers.update({part: self.messages.gather(own[part], receivers) for part in order})

    def scattered(self) -> Tensor:
        """All parts' sums; waits for them."""
        sums = [self.scatters.pop(part)() for part in range(len(self.samples))]
        return sums[0] if len(sums) == 1 else torch.cat(sums)


class _Begin(torch.autograd.Function):
    """This rank's tokens, by part; they are on their way to the active ranks from here on."""

    @staticmethod
    def forward(ctx: Any, flow: _Flow, x: Tensor) -> tuple[Tensor, ...]:
        ctx.flow = flow
        own = tuple(part.contiguous() for part in x.detach().split(flow.samples))
        flow.gather(own, flow.active, range(len(own)))
        return own

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.flow.scattered()


class _Gathered(torch.autograd.Function):
    """All tokens of a part on the active ranks, none on the others. Its gradient is on its way from here on."""

    @staticmethod
    def forward(ctx: Any, flow: _Flow, part: int, own: Tensor) -> Tensor:
        ctx.flow, ctx.part, ctx.like = flow, part, own[:, :0]
        ctx.set_materialize_grads(False)
        whole = flow.gathers.pop(part)()
        return own.new_empty(own.shape[0], 0, own.shape[2]) if whole is None else whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        flow, messages = ctx.flow, ctx.flow.messages
        own = gradients[0] if messages.rank in flow.full else None
        flow.scatters[ctx.part] = messages.scatter_sum(own, ctx.like, flow.full)
        return None, None, _promise(ctx.like, messages)


class _Sent(torch.autograd.Function):
    """What this rank computed of a part is on its way from here on. `entered` ties the backward of ranks that computed
    nothing to the messages."""

    @staticmethod
    def forward(
        ctx: Any, flow: _Flow, part: int, anchor: Tensor, own: Tensor | None, entered: Tensor
    ) -> Tensor:
        ctx.flow, ctx.part = flow, part
        flow.scatters[part] = flow.messages.scatter_sum(own, entered, flow.active)
        return _promise(entered, flow.messages)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        whole = ctx.flow.gathers.pop(ctx.part)()
        return None, None, None, whole if ctx.needs_input_grad[3] else None, None


class _End(torch.autograd.Function):
    """The sums, of all parts."""

    @staticmethod
    def forward(ctx: Any, flow: _Flow, anchor: Tensor, *promises: Tensor) -> Tensor:
        ctx.flow = flow
        ctx.save_for_backward(anchor)
        return flow.scattered()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Where activations are recomputed, all ranks do so now, before the first message of the block's backward.
        _ = ctx.saved_tensors
        flow = ctx.flow
        own = [part.contiguous() for part in gradients[0].split(flow.samples)]
        flow.gather(own, flow.full, range(len(own))[::-1])  # autograd comes to the last part first
        return None, None, *own


def _promise(like: Tensor, messages: ShardedTokens) -> Tensor:
    """Stands for this rank's tokens while they are under way; never read. like: of as many samples and channels."""
    run = messages.run(messages.rank)
    return like.new_empty(()).expand(like.shape[0], run.stop - run.start, like.shape[2])
