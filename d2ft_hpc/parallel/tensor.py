"""Tensor parallelism by head: ranks that share a block, each with its own heads, follow one row of the plan.

A branch is the sum of what the ranks' heads give, with its row bias, LayerScale and the residual after the sum, once;
the gradient of the branch's input is summed before it reaches the norm. `messages` has two ways of doing so. Where
every rank holds all tokens, norms, row biases and LayerScale have the same, whole gradients on all ranks; only those of
parameters that each rank's heads use by themselves without owning them (q/k norms, LoRA's shared halves) are summed.
Where each holds its own tokens, all of them are.

Where one rank alone has heads to run in a block, nothing is summed between its branches: the rank gets the block's
input, computes both, and gives what they add; half the messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, distributed

from d2ft_hpc.errors import UnsupportedModelError
from d2ft_hpc.execution.block import BlockHeads, attention_heads, branch_ends, ffn_slices
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.gradients import Owners
from d2ft_hpc.execution.rows import choose_heads
from d2ft_hpc.model.subnets import HeadAxis
from d2ft_hpc.parallel.head_split import check_owner, cut_block, heads_of, local_axis
from d2ft_hpc.parallel.messages import (
    PartialGradients,
    Ranks,
    ReplicatedTokens,
    ShardedTokens,
    StepSum,
    TokenMessages,
    present_owners,
    whole_gradients,
)
from d2ft_hpc.planning.messages import LAYOUTS, TokenLayout
from d2ft_hpc.planning.plan import Operation, SkipPlan
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

    @property
    def alone(self) -> bool:
        """One rank runs all that runs of the block."""
        return len(self.active_ranks) == 1


class TensorParallelExecutor(PlanExecutor):
    """The plan of blocks that were cut by head; made by `share_blocks`."""

    def __init__(
        self, whole: PlanExecutor, owner: Ints, layouts: Mapping[TokenLayout, TokenMessages]
    ) -> None:
        """whole: the executor of the uncut model. owner: int64 [block, head], ranks of the group.

        layouts: of the tokens; the first is in use until `use` changes it.
        """
        self.token_layout, messages = next(iter(layouts.items()))
        ranks = messages.group.size()
        check_owner(owner, whole.subnets.shape, ranks)
        vars(self).update(vars(whole))
        self._steps: dict[int, StepSum] = {}
        self.blocks = dict(whole.blocks)
        self.deactivate()
        self._owner, self._layouts, self.messages = owner, layouts, messages
        self._axes = [
            {name: local_axis(axis, int(own)) for name, axis in whole.subnets.head_axes.items()}
            for own in (owner == messages.rank).sum(axis=1)
        ]
        _, self._dense = self._choose(np.full(owner.shape, Operation.FULL), np.ones(len(owner)))

    def activate(self, plan: SkipPlan, replica: int) -> None:
        super().activate(plan, replica)
        self._steps = {index: self._step_sum(index) for index in self.blocks if self.rows}

    def deactivate(self) -> None:
        super().deactivate()
        self._steps = {}

    def _step_sum(self, index: int) -> StepSum:
        trained = [row.heads[index] for row in self.rows if row.heads[index].trains]
        return StepSum(len(trained), any(isinstance(heads, SharedHeads) and heads.alone for heads in trained))

    def use(self, token_layout: TokenLayout) -> None:
        """The layout of the tokens from the next micro-batch on; on all ranks of the group alike.

        Raises UnsupportedModelError where the model cannot run in it.
        """
        if token_layout not in self._layouts:
            raise UnsupportedModelError(
                f"engine.token_layout={token_layout}: the model draws random numbers for single tokens (proj_drop, "
                f"drop2, patch_drop; with overlapped also for single samples, drop_path) or takes images of any size; "
                f"use one of {', '.join(self._layouts)}"
            )
        self.token_layout, self.messages = token_layout, self._layouts[token_layout]

    def _run(
        self, block: Block, index: int, heads: BlockHeads | None, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if args or any(value is not None and value is not False for value in kwargs.values()):
            raise UnsupportedModelError(
                "attention masks are not supported with engine.tensor_parallel > 1: remove the mask"
            )
        heads = self._dense[index] if heads is None else heads
        assert isinstance(heads, SharedHeads)
        # Outside a plan's steps (`temporarily`), each micro-batch stands for itself.
        step = StepSum() if self.plan is None else self._steps.get(index, StepSum())
        return run_shared_block(block, x, heads, self._axes[index], self.messages, step, self.slot)

    def _choose(self, operations: np.ndarray, scales: np.ndarray) -> tuple[Tensor, list[SharedHeads]]:
        owned = list(zip(operations, self._owner, strict=True))
        indices, own = choose_heads(
            [cells[owner == self.messages.rank] for cells, owner in owned],
            scales.tolist(),
            self._device,
        )
        ranks = (
            tuple(
                tuple(np.unique(owner[cells >= least]).tolist())
                for least in (Operation.FULL, Operation.FORWARD_ONLY)
            )
            for cells, owner in owned
        )
        return indices, [
            SharedHeads(heads.order, heads.num_full, heads.places, full, active, scale=heads.scale)
            for heads, (full, active) in zip(own, ranks, strict=True)
        ]


def share_blocks(
    blocks: dict[int, Block],
    whole: PlanExecutor,
    owner: Ints,
    group: distributed.ProcessGroup,
    tokens: int | None,
    kind: type[TensorParallelExecutor] = TensorParallelExecutor,
) -> TensorParallelExecutor:
    """Cuts blocks that are attached to `whole`, by their index in the model, down to this rank's heads.

    group: the tensor-parallel ranks. tokens: of every sample between the blocks; None if that varies.

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
    rank = distributed.get_rank(group)
    executor = kind(
        whole,
        owner,
        {layout: _messages(layout, group, rank, tokens) for layout in layouts_of(blocks.values(), tokens)},
    )
    for index, block in blocks.items():
        cut_block(block, whole.subnets.head_axes, heads_of(owner, index, rank))
        executor.link(block, index)
    return executor


def layouts_of(blocks: Iterable[Block], tokens: int | None) -> tuple[TokenLayout, ...]:
    """Those in which the blocks draw the same random numbers on all ranks. tokens: as `share_blocks` takes it."""
    blocks = list(blocks)
    if tokens is None or any(block.attn.proj_drop.p > 0 or block.mlp.drop2.p > 0 for block in blocks):
        return ("replicated",)
    paths = [path for block in blocks for path in (block.drop_path1, block.drop_path2)]
    draws_by_sample = any(getattr(path, "drop_prob", 0.0) > 0 for path in paths)
    return ("replicated", "sharded") if draws_by_sample else LAYOUTS


def _messages(
    layout: TokenLayout, group: distributed.ProcessGroup, rank: int, tokens: int | None
) -> TokenMessages:
    if layout == "replicated":
        return ReplicatedTokens(group, rank)
    assert tokens is not None
    return ShardedTokens(group, rank, tokens, parts=2 if layout == "overlapped" else 1)


def used_by_head(block: Block, axes: dict[str, HeadAxis]) -> Owners:
    """The trainable parameters that each head uses by itself and none owns: q/k norms, LoRA's shared halves."""
    return [
        (module._parameters, name)
        for part in ("attn", "mlp")
        for path, module in block.get_submodule(part).named_modules(prefix=part)
        for name, parameter in module.named_parameters(recurse=False)
        if ("norm" in path or "lora_" in path) and f"{path}.{name}" not in axes and parameter.requires_grad
    ]


def run_shared_block(
    block: Block,
    x: Tensor,
    heads: SharedHeads,
    axes: dict[str, HeadAxis],
    messages: TokenMessages,
    step: StepSum,
    slot: int | None,
) -> Tensor:
    """One rank's part of a block. x and the result: [sample, token, channel], as `messages` splits them.

    step, slot: where gradients are kept of which the rank has a part, and under which micro-batch.
    """
    if not heads.active_ranks:
        return x

    def attend(normed: Tensor, chosen: Tensor) -> Tensor:
        return attention_heads(block, axes, normed, chosen, None, None, False)

    def feed_forward(normed: Tensor, chosen: Tensor) -> Tensor:
        return ffn_slices(block, axes, normed, chosen, None)

    with whole_gradients(
        messages, _partial(block, heads, axes, messages, step, slot), heads.full_ranks, x
    ) as x:
        end_attention, end_feed_forward = branch_ends(block, heads.scale)
        attention = _Branch(heads, block.norm1, attend, block.attn.proj.bias, end_attention)
        ffn = _Branch(heads, block.norm2, feed_forward, block.mlp.fc2.bias, end_feed_forward)
        if heads.alone:
            return x + _alone(x, attention, ffn, messages)
        x = x + _together(x, attention, messages)
        return x + _together(x, ffn, messages)


def _partial(
    block: Block,
    heads: SharedHeads,
    axes: dict[str, HeadAxis],
    messages: TokenMessages,
    step: StepSum,
    slot: int | None,
) -> PartialGradients:
    by_head = used_by_head(block, axes)
    after_heads = present_owners([block.norm1, block.norm2, block.ls1, block.ls2])
    after_heads += present_owners([block.attn.proj, block.mlp.fc2], ["bias"])
    if not messages.has_whole_gradients or heads.alone:
        return PartialGradients([*by_head, *after_heads], step, slot)
    if step.alone:
        return PartialGradients([*by_head, *after_heads], step, slot, whole=len(after_heads))
    return PartialGradients(by_head, step, slot)


@dataclass(frozen=True)
class _Branch:
    """A residual branch of a block: `compute` for each set of heads; then bias and `end` after the sum over heads."""

    heads: SharedHeads
    norm: Callable[[Tensor], Tensor]
    compute: Callable[[Tensor, Tensor], Tensor]
    bias: Tensor | None
    end: Callable[[Tensor], Tensor]

    @property
    def ranks(self) -> tuple[Ranks, Ranks]:
        """Those that run the branch, and those that train it."""
        return self.heads.active_ranks, self.heads.full_ranks

    @property
    def gradients(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.heads.trains else torch.no_grad()

    def of_own_heads(self, normed: Tensor) -> Tensor | None:
        """Of this rank; None if it runs none."""
        full, forward_only = self.heads.full, self.heads.forward_only
        own = None if full is None else self.compute(normed, full)
        if forward_only is not None:
            with torch.no_grad():
                beside = self.compute(normed, forward_only)
                own = beside if own is None else own.add_(beside)
        return own

    def finish(self, total: Tensor) -> Tensor:
        return self.end(total if self.bias is None else total + self.bias)


def _together(x: Tensor, branch: _Branch, messages: TokenMessages) -> Tensor:
    """What a branch adds: this rank's sum over its heads, the sum over the ranks, the rest."""
    with branch.gradients:
        return branch.finish(messages.through(branch.norm(x), branch.of_own_heads, *branch.ranks))


def _alone(x: Tensor, attention: _Branch, ffn: _Branch, messages: TokenMessages) -> Tensor:
    """What both branches add together, computed by one rank."""

    def both(entered: Tensor) -> Tensor | None:
        of_heads = attention.of_own_heads(attention.norm(entered))
        if of_heads is None:
            with torch.no_grad():  # what the other rank draws (DropPath)
                attention.end(entered)
                ffn.end(entered)
            return None
        after_attention = attention.finish(of_heads)
        of_slices = ffn.of_own_heads(ffn.norm(entered + after_attention))
        assert of_slices is not None
        return after_attention + ffn.finish(of_slices)

    with attention.gradients:
        return messages.through(x, both, *attention.ranks)
