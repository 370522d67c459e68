"""Tensor parallelism by head: ranks that share a block, each with its own heads, follow one row of the plan.

A branch is the sum of what the ranks' heads give, with its row bias, LayerScale and the residual after the sum, once;
the gradient of the branch's input is summed before it reaches the norm. `token_exchange` has two ways of doing so.
Where every rank holds all tokens, norms, row biases and LayerScale have the same, whole gradients on all ranks; only
those of parameters that each rank's heads use by themselves without owning them (q/k norms, LoRA's shared halves) are
summed. Where each holds its own tokens, all of them are.

Where one rank alone has heads to run in a block, nothing is summed between its branches: this rank gets the block's
input, computes both branches, and sends what they add. This takes half the messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from d2ft_hpc.errors import ConfigError, PlanError, UnsupportedModelError
from d2ft_hpc.execution.block import BlockHeads
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.gradients import Owners
from d2ft_hpc.execution.rows import choose_heads
from d2ft_hpc.families.family import BlockFamily, Branch, rate_of
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.parallel.head_split import check_owner, check_parts, cut_block, heads_of
from d2ft_hpc.parallel.partial_gradients import PartialGradients, StepSum, whole_gradients
from d2ft_hpc.parallel.sharded_tokens import ShardedTokens
from d2ft_hpc.parallel.token_exchange import Ranks, ReplicatedTokens, TokenExchange
from d2ft_hpc.planning.arrays import Ints
from d2ft_hpc.planning.communication_volume import LAYOUTS, TokenLayout
from d2ft_hpc.planning.plan import Operation, SkipPlan


@dataclass(frozen=True)
class SharedHeads(BlockHeads):
    """What one rank runs of a block, in places of its own heads, and what all ranks of the group do.

    full_ranks, active_ranks: those with a FULL head, and with one that is not SHORTCUT.
    """

    full_ranks: Ranks
    active_ranks: Ranks

    @property
    def trains(self) -> bool:
        """Whether some rank does, so that all of them take part in the sums."""
        return bool(self.full_ranks)

    @property
    def alone(self) -> bool:
        """One rank runs all that runs of the block."""
        return len(self.active_ranks) == 1

    def gradients(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.trains else torch.no_grad()


class TensorParallelExecutor(PlanExecutor):
    """The plan of blocks that were cut by head; made by `share_blocks`."""

    def __init__(
        self, whole: PlanExecutor, owner: Ints, layouts: Mapping[TokenLayout, TokenExchange]
    ) -> None:
        """whole: the executor of the uncut model. owner: int64 [block, head], ranks of the group.

        layouts: of the tokens; the first is in use until `use` changes it.
        """
        self.token_layout, messages = next(iter(layouts.items()))
        ranks = messages.group.size()
        check_owner(owner, whole.subnets.shape, ranks)
        vars(self).update(vars(whole))
        self.images = copy(whole.images)
        self.images.grid = self.grid
        self._steps: dict[int, StepSum] = {}
        self._unowned: dict[int, tuple[Owners, Owners]] = {}
        self.blocks = dict(whole.blocks)
        self.deactivate()
        self.owner, self._layouts, self.messages = owner, layouts, messages
        self._axes = [
            {name: axis.of(int(own)) for name, axis in whole.subnets.head_axes.items()}
            for own in (owner == messages.rank).sum(axis=1)
        ]
        _, self._dense = self._choose(np.full(owner.shape, Operation.FULL))

    def activate(self, plan: SkipPlan, replica: int) -> None:
        if plan.grids is not None and self.token_layout != "replicated":
            raise PlanError(
                f"engine.token_layout={self.token_layout}: ranks share out the tokens of images of one size, but the "
                f"plan scales images; use replicated"
            )
        super().activate(plan, replica)
        self._steps = {index: self._step_sum(index) for index in self.blocks if self.rows}

    def deactivate(self) -> None:
        super().deactivate()
        self._steps = {}

    def _sparse(self, all_dense: np.ndarray) -> np.ndarray:
        # In which order a block's gradients come in one micro-batch follows from the others of the step (`_partial`).
        return np.broadcast_to(~all_dense.all(axis=0), all_dense.shape)

    def _step_sum(self, index: int) -> StepSum:
        trained = [row.heads[index] for row in self.rows if row.heads[index].trains]
        return StepSum(len(trained), any(isinstance(heads, SharedHeads) and heads.alone for heads in trained))

    def use(self, token_layout: TokenLayout) -> None:
        """Sets the layout of the tokens from the next micro-batch on; all ranks of the group must set the same.

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
        self, block: nn.Module, index: int, heads: BlockHeads | None, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if args or any(value is not None and value is not False for value in kwargs.values()):
            raise UnsupportedModelError(
                "attention masks are not supported with engine.tensor_parallel > 1: remove the mask"
            )
        heads = self._dense[index] if heads is None else heads
        assert isinstance(heads, SharedHeads)
        # Outside a plan's steps (`temporarily`), each micro-batch stands for itself.
        step = StepSum() if self.plan is None else self._steps.get(index, StepSum())
        if not heads.active_ranks:
            return x
        messages, summed = self.messages, self._partial(block, index, heads, step)
        with whole_gradients(messages, summed, heads.full_ranks, x) as x:
            branches = self.subnets.family.branches(block, self._axes[index])
            if heads.alone:
                return x + _alone(x, heads, branches, messages)
            for branch in branches:
                x = x + _together(x, heads, branch, messages)
            return x

    def _partial(self, block: nn.Module, index: int, heads: SharedHeads, step: StepSum) -> PartialGradients:
        if index not in self._unowned:
            self._unowned[index] = _unowned(self.subnets, block)
        owners, after_heads = (
            [(kept, name) for kept, name in some if kept[name].requires_grad] for some in self._unowned[index]
        )
        if not self.messages.has_whole_gradients or heads.alone:
            return PartialGradients([*owners, *after_heads], step, self.slot)
        if step.alone:
            return PartialGradients([*owners, *after_heads], step, self.slot, whole=len(after_heads))
        return PartialGradients(owners, step, self.slot)

    def _choose(self, operations: np.ndarray) -> tuple[Tensor, list[SharedHeads]]:
        owned = list(zip(operations, self.owner, strict=True))
        indices, own = choose_heads(
            [cells[owner == self.messages.rank] for cells, owner in owned], self._device
        )
        ranks = (
            tuple(
                tuple(np.unique(owner[cells >= least]).tolist())
                for least in (Operation.FULL, Operation.FORWARD_ONLY)
            )
            for cells, owner in owned
        )
        return indices, [
            SharedHeads(heads.order, heads.num_full, heads.places, full, active)
            for heads, (full, active) in zip(own, ranks, strict=True)
        ]


def share_blocks(
    blocks: dict[int, nn.Module],
    whole: PlanExecutor,
    owner: Ints,
    group: distributed.ProcessGroup,
    tokens: int | None,
    kind: type[TensorParallelExecutor] = TensorParallelExecutor,
) -> TensorParallelExecutor:
    """Cuts blocks that are attached to `whole`, by their index in the model, down to this rank's heads.

    group: the tensor-parallel ranks. tokens: of every sample between the blocks; None if that varies.

    Raises UnsupportedModelError where ranks would draw other random numbers, PlanError if the owner map does not fit,
    ConfigError where blocks are to be CUDA graphs.
    """
    if whole.makes_graphs:
        raise ConfigError(
            "cuda_graphs: blocks that are cut over ranks send messages, and a process with messages in graphs does "
            "not end: leave it out"
        )
    subnets = whole.subnets
    check_parts(subnets.family)
    for index, block in blocks.items():
        by_head = subnets.family.drops(block).by_head
        for name, module in block.named_modules():
            if (name in by_head or "lora_dropout" in name) and rate_of(module) > 0:
                raise UnsupportedModelError(
                    f"block {index} has dropout in {name}, and every tensor-parallel rank would draw its own: "
                    f"set it to 0, or do without tensor parallelism"
                )
        if any(branch.across is not None for branch in subnets.family.branches(block, subnets.head_axes)):
            raise UnsupportedModelError(
                f"block {index} normalises across all of its heads' channels, while each tensor-parallel rank has "
                f"a part: do without tensor parallelism"
            )
    rank = distributed.get_rank(group)
    layouts = layouts_of(subnets.family, blocks.values(), tokens)
    executor = kind(whole, owner, {layout: _messages(layout, group, rank, tokens) for layout in layouts})
    for index, block in blocks.items():
        cut_block(block, subnets, heads_of(owner, index, rank))
        executor.link(block, index)
    if (model := whole.images.model) is not None:
        executor.images.link(model)
    return executor


def layouts_of(
    family: BlockFamily, blocks: Iterable[nn.Module], tokens: int | None
) -> tuple[TokenLayout, ...]:
    """The layouts in which the blocks draw the same random numbers on all ranks. tokens: as `share_blocks` takes it."""
    drops = [family.drops(block) for block in blocks]
    if tokens is None or any(rate_of(drop) > 0 for of_block in drops for drop in of_block.by_token):
        return ("replicated",)
    draws_by_sample = any(rate > 0 for of_block in drops for rate in of_block.rates_by_sample)
    return ("replicated", "sharded") if draws_by_sample else LAYOUTS


def _messages(
    layout: TokenLayout, group: distributed.ProcessGroup, rank: int, tokens: int | None
) -> TokenExchange:
    if layout == "replicated":
        return ReplicatedTokens(group, rank)
    assert tokens is not None
    return ShardedTokens(group, rank, tokens, parts=2 if layout == "overlapped" else 1)


def _unowned(subnets: SubnetMap, block: nn.Module) -> tuple[Owners, Owners]:
    """Parameters that no head owns: those that each head uses by itself (q/k norms, LoRA's shared halves), and those
    of what goes into or comes out of all of them."""
    by_head, after_heads = Owners(), Owners()
    for path, module in block.named_modules():
        for name, parameter in module._parameters.items():
            of_block = f"{path}.{name}" if path else name
            if parameter is not None and of_block not in subnets.head_axes:
                is_by_head = subnets.family.used_by_head(of_block)
                (by_head if is_by_head else after_heads).append((module._parameters, name))
    return by_head, after_heads


def _together(x: Tensor, heads: SharedHeads, branch: Branch, messages: TokenExchange) -> Tensor:
    """What a branch adds: this rank's sum over its heads, the sum over the ranks, the rest."""
    with heads.gradients():
        own = partial(_of_own_heads, heads, branch)
        total = messages.through(branch.norm(x), own, heads.active_ranks, heads.full_ranks)
        return _finished(branch, total)


def _alone(x: Tensor, heads: SharedHeads, branches: Sequence[Branch], messages: TokenExchange) -> Tensor:
    """What all branches add together, computed by one rank."""

    def all_of_them(entered: Tensor) -> Tensor | None:
        added: Tensor | None = None
        for branch in branches:
            normed = branch.norm(entered if added is None else entered + added)
            total = _of_own_heads(heads, branch, normed)
            assert total is not None
            finished = _finished(branch, total)
            added = finished if added is None else added + finished
        return added

    def nothing(entered: Tensor) -> None:
        with torch.no_grad():  # what the other rank draws (DropPath)
            for branch in branches:
                branch.end(entered)

    compute = nothing if heads.is_shortcut else all_of_them
    with heads.gradients():
        return messages.through(x, compute, heads.active_ranks, heads.full_ranks)


def _of_own_heads(heads: SharedHeads, branch: Branch, normed: Tensor) -> Tensor | None:
    """The output of this rank's heads; None if it runs none."""

    def summed(chosen: Tensor) -> Tensor:
        return branch.out(branch.inner(normed, chosen), chosen, None)

    own = None if heads.full is None else summed(heads.full)
    if heads.forward_only is not None:
        with torch.no_grad():
            beside = summed(heads.forward_only)
            own = beside if own is None else own.add_(beside)
    return own


def _finished(branch: Branch, total: Tensor) -> Tensor:
    return branch.end(total if branch.bias is None else total + branch.bias)
