"""Tensor parallelism by head: ranks that share a block, each with its own heads, follow one row of the plan.

Every rank holds all tokens. A branch is the sum of what the ranks' heads give, with its row bias, LayerScale and the
residual after the sum, once; the gradient of the branch's input is summed before it reaches the norm. So the norms,
row biases and LayerScale have the same, whole gradients on all ranks; only those of parameters that each rank's heads
use by themselves without owning them (q/k norms, LoRA's shared halves) are summed like the input's (Shoeybi et al.,
2019, arXiv 1909.08053, for the sums).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from d2ft_hpc.errors import UnsupportedModelError
from d2ft_hpc.execution.block import BlockHeads, attention_heads, branch_ends, ffn_slices
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.gradients import Owners, stand_ins
from d2ft_hpc.model.subnets import HeadAxis
from d2ft_hpc.parallel.head_split import check_owner, cut_block, heads_of, local_axis
from d2ft_hpc.parallel.messages import Ranks, ReplicatedTokens
from d2ft_hpc.planning.plan import Operation
from d2ft_hpc.planning.problem import Ints


@dataclass(frozen=True)
class SharedHeads(BlockHeads):
    """What one rank runs of a block, in places of its own heads, and what all ranks of the group do.

    full_ranks, active_ranks: those with a FULL head, and with one that is not SHORTCUT.
    """

    full_ranks: Ranks
    active_ranks: Ranks

    @property
    def trains(self) -> bool:
        """On some rank, so that all of them take part in the sums."""
        return bool(self.full_ranks)


class TensorParallelExecutor(PlanExecutor):
    """The plan of blocks that were cut by head; made by `share_blocks`."""

    def __init__(self, whole: PlanExecutor, owner: Ints, messages: ReplicatedTokens) -> None:
        """whole: the executor of the uncut model. owner: int64 [block, head], ranks of the group."""
        ranks = messages.group.size()
        check_owner(owner, whole.subnets.shape, ranks)
        vars(self).update(vars(whole))
        self.blocks = dict(whole.blocks)
        self.unload()
        self._owner, self._messages = owner, messages
        self._axes = [
            {name: local_axis(axis, int(own)) for name, axis in whole.subnets.head_axes.items()}
            for own in (owner == messages.rank).sum(axis=1)
        ]
        self._dense = [
            self._heads(np.full(row.shape, Operation.FULL), block) for block, row in enumerate(owner)
        ]
        self._by_head: dict[int, tuple[Owners, Owners]] = {}

    def _run(
        self, block: Block, index: int, heads: BlockHeads | None, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if args or any(value is not None and value is not False for value in kwargs.values()):
            raise UnsupportedModelError(
                "attention masks are not supported with engine.tensor_parallel > 1: remove the mask"
            )
        heads = self._dense[index] if heads is None else heads
        assert isinstance(heads, SharedHeads)
        return run_shared_block(block, x, heads, self._axes[index], self._by_head[index], self._messages)

    def link(self, block: Block, index: int) -> None:
        super().link(block, index)
        self._by_head[index] = tuple(used_by_head(block, name, self._axes[index]) for name in ("attn", "mlp"))  # type: ignore[assignment]

    def _heads(self, cells: np.ndarray, index: int) -> SharedHeads:
        own = super()._heads(cells[self._owner[index] == self._messages.rank], index)
        full, active = (
            tuple(np.unique(self._owner[index][cells >= least]).tolist())
            for least in (Operation.FULL, Operation.FORWARD_ONLY)
        )
        return SharedHeads(own.full, own.forward_only, own.is_dense, full, active, scale=own.scale)


def share_blocks(
    blocks: dict[int, Block],
    whole: PlanExecutor,
    owner: Ints,
    messages: ReplicatedTokens,
    kind: type[TensorParallelExecutor] = TensorParallelExecutor,
) -> TensorParallelExecutor:
    """Cuts blocks that are attached to `whole`, by their index in the model, down to this rank's heads.

    Raises UnsupportedModelError where ranks would draw other random numbers, PlanError if the owner map does not fit.
    """
    for index, block in blocks.items():
        for name, module in block.named_modules():
            by_head = name in ("attn.attn_drop", "mlp.drop1") or "lora_dropout" in name
            if by_head and getattr(module, "p", 0.0) > 0:
                raise UnsupportedModelError(
                    f"block {index} has dropout in {name}, of which every tensor-parallel rank would draw its own: set "
                    f"it to 0, or engine.tensor_parallel=1"
                )
    executor = kind(whole, owner, messages)
    for index, block in blocks.items():
        cut_block(block, whole.subnets.head_axes, heads_of(owner, index, messages.rank))
        executor.link(block, index)
    return executor


def used_by_head(block: Block, part: str, axes: dict[str, HeadAxis]) -> Owners:
    """The parameters of `part` ("attn", "mlp") that each head uses by itself, which no head owns."""
    return [
        (module._parameters, name)
        for path, module in block.get_submodule(part).named_modules(prefix=part)
        for name, _ in module.named_parameters(recurse=False)
        if ("norm" in path or "lora_" in path) and f"{path}.{name}" not in axes
    ]


def run_shared_block(
    block: Block,
    x: Tensor,
    heads: SharedHeads,
    axes: dict[str, HeadAxis],
    by_head: tuple[Owners, Owners],
    messages: ReplicatedTokens,
) -> Tensor:
    """One rank's part of a block, the same result on every rank. x: [sample, token, channel].

    by_head: what the heads use by themselves without owning it, in attention and in the FFN.
    """
    if not heads.active_ranks:
        return x

    def attend(normed: Tensor, chosen: Tensor) -> Tensor:
        return attention_heads(block, axes, normed, chosen, None, None, False)

    def feed_forward(normed: Tensor, chosen: Tensor) -> Tensor:
        return ffn_slices(block, axes, normed, chosen, None)

    end_attention, end_feed_forward = branch_ends(block, heads.scale)
    in_attention, in_feed_forward = by_head
    x = x + _branch(
        x, heads, block.norm1, in_attention, attend, block.attn.proj.bias, end_attention, messages
    )
    return x + _branch(
        x, heads, block.norm2, in_feed_forward, feed_forward, block.mlp.fc2.bias, end_feed_forward, messages
    )


def _branch(
    x: Tensor,
    heads: SharedHeads,
    norm: Callable[[Tensor], Tensor],
    by_head: Owners,
    compute: Callable[[Tensor, Tensor], Tensor],
    bias: Tensor | None,
    end: Callable[[Tensor], Tensor],
    messages: ReplicatedTokens,
) -> Tensor:
    """A residual branch: this rank's sum over its heads, the sum over the ranks, the rest."""
    if not heads.full_ranks:
        with torch.no_grad():
            idle = heads.forward_only is None
            own = torch.zeros_like(x) if idle else compute(norm(x), heads.forward_only)  # type: ignore[arg-type]
            total = messages.sum(own, heads.active_ranks)
            return end(total if bias is None else total + bias)
    entered = messages.enter([norm(x), *(kept[name] for kept, name in by_head)], heads.full_ranks)
    normed = entered[0]
    with stand_ins(by_head, entered[1:]):
        own = torch.zeros_like(normed) if heads.full is None else compute(normed, heads.full)
        if heads.forward_only is not None:
            with torch.no_grad():
                own.add_(compute(normed, heads.forward_only))
    total = messages.leave(own, entered, heads.active_ranks)
    return end(total if bias is None else total + bias)
