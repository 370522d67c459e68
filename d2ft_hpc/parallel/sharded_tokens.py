"""Tokens that tensor-parallel ranks hold a part of each between branches, and the messages that this takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from d2ft_hpc.parallel.token_exchange import Compute, Ranks, TokenExchange


@dataclass(frozen=True)
class ShardedTokens(TokenExchange):
    """Between branches every rank holds its own run of each sample's tokens, so that norms, LayerScale, biases and the
    residual are computed once (Korthikanti et al., 2022, arXiv 2205.05198). Only active ranks receive the others'
    tokens and send partial sums, in messages from rank to rank.

    tokens: of a sample. Runs differ by at most one token.
    parts: of a micro-batch's samples. The messages of one are under way while the next is computed.
    """

    has_whole_gradients = False

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
    """Begins to send this rank's tokens, by part, to the active ranks."""

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
    """Begins to send what this rank computed of a part. `entered` ties the backward of ranks that computed nothing to
    the messages."""

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
