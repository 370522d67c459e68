"""Tensor parallelism by head: ranks that share a block, each with its own heads, follow one row of the plan.

Every rank holds all tokens. A branch is the sum of what the ranks' heads give, with its row bias, LayerScale and the
residual after the sum, once; the gradient of the branch's input is summed before it reaches the norm. So the norms,
row biases and LayerScale have the same, whole gradients on all ranks; only those of q/k norms, which each rank's heads
use by themselves, are summed like the input's (Shoeybi et al., 2019, arXiv 1909.08053, for the sums).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.func import functional_call

from d2ft_hpc.errors import UnsupportedModelError
from d2ft_hpc.execution.block import BlockHeads, attention_heads, branch_ends, ffn_slices
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.model.subnets import LINEAR_LAYERS, HeadAxis
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

    def _run(
        self, block: Block, index: int, heads: BlockHeads | None, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if args or any(value is not None and value is not False for value in kwargs.values()):
            raise UnsupportedModelError(
                "attention masks are not supported with engine.tensor_parallel > 1: remove the mask"
            )
        heads = self._dense[index] if heads is None else heads
        assert isinstance(heads, SharedHeads)
        return run_shared_block(block, x, heads, self._axes[index], self._messages)

    def _heads(self, cells: np.ndarray, index: int) -> SharedHeads:
        own = super()._heads(cells[self._owner[index] == self._messages.rank], index)
        full, active = (
            tuple(np.unique(self._owner[index][cells >= least]).tolist())
            for least in (Operation.FULL, Operation.FORWARD_ONLY)
        )
        return SharedHeads(own.full, own.forward_only, own.is_dense, full, active, scale=own.scale)


def share_blocks(
    blocks: dict[int, Block], whole: PlanExecutor, owner: Ints, messages: ReplicatedTokens
) -> TensorParallelExecutor:
    """Cuts blocks that are attached to `whole`, by their index in the model, down to this rank's heads.

    Raises UnsupportedModelError where ranks would draw other random numbers, PlanError if the owner map does not fit.
    """
    for index, block in blocks.items():
        for name in ("attn.attn_drop", "mlp.drop1"):
            if getattr(block.get_submodule(name), "p", 0.0) > 0:
                raise UnsupportedModelError(
                    f"block {index} has dropout in {name}, of which every tensor-parallel rank would draw its own: set "
                    f"it to 0, or engine.tensor_parallel=1"
                )
        for name in LINEAR_LAYERS:
            added = [
                part
                for part, _ in block.get_submodule(name).named_parameters()
                if part not in ("weight", "bias")
            ]
            if added:
                raise UnsupportedModelError(
                    f"block {index} has {added[0]} in {name} (LoRA?), which tensor-parallel ranks would not sum up: "
                    f"train the whole weights, or set engine.tensor_parallel=1"
                )
    executor = TensorParallelExecutor(whole, owner, messages)
    for index, block in blocks.items():
        cut_block(block, whole.subnets.head_axes, heads_of(owner, index, messages.rank))
        executor.link(block, index)
    return executor


def run_shared_block(
    block: Block, x: Tensor, heads: SharedHeads, axes: dict[str, HeadAxis], messages: ReplicatedTokens
) -> Tensor:
    """One rank's part of a block, the same result on every rank. x: [sample, token, channel]."""
    if not heads.active_ranks:
        return x
    norms = {"q_norm": block.attn.q_norm, "k_norm": block.attn.k_norm}

    def attend(normed: Tensor, chosen: Tensor, norm_parameters: dict[str, Tensor]) -> Tensor:
        q_norm, k_norm = (_with_parameters(norms[name], name, norm_parameters) for name in norms)
        return attention_heads(block, axes, normed, chosen, None, None, False, q_norm, k_norm)

    def feed_forward(normed: Tensor, chosen: Tensor, _: dict[str, Tensor]) -> Tensor:
        return ffn_slices(block, axes, normed, chosen, None)

    end_attention, end_feed_forward = branch_ends(block, heads.scale)
    by_head = {f"{name}.{inner}": p for name, norm in norms.items() for inner, p in norm.named_parameters()}
    x = x + _branch(x, heads, block.norm1, by_head, attend, block.attn.proj.bias, end_attention, messages)
    return x + _branch(
        x, heads, block.norm2, {}, feed_forward, block.mlp.fc2.bias, end_feed_forward, messages
    )


def _branch(
    x: Tensor,
    heads: SharedHeads,
    norm: Callable[[Tensor], Tensor],
    by_head: dict[str, nn.Parameter],
    compute: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
    bias: Tensor | None,
    end: Callable[[Tensor], Tensor],
    messages: ReplicatedTokens,
) -> Tensor:
    """A residual branch: this rank's sum over its heads, the sum over the ranks, the rest.

    by_head: parameters that each head uses by itself, which no head owns.
    """
    if not heads.full_ranks:
        with torch.no_grad():
            idle = heads.forward_only is None
            own = torch.zeros_like(x) if idle else compute(norm(x), heads.forward_only, dict(by_head))  # type: ignore[arg-type]
            total = messages.sum(own, heads.active_ranks)
            return end(total if bias is None else total + bias)
    entered = messages.enter([norm(x), *by_head.values()], heads.full_ranks)
    normed, parameters = entered[0], dict(zip(by_head, entered[1:], strict=True))
    own = torch.zeros_like(normed) if heads.full is None else compute(normed, heads.full, parameters)
    if heads.forward_only is not None:
        with torch.no_grad():
            own.add_(compute(normed, heads.forward_only, parameters))
    total = messages.leave(own, entered, heads.active_ranks)
    return end(total if bias is None else total + bias)


def _with_parameters(
    module: nn.Module, name: str, parameters: dict[str, Tensor]
) -> Callable[[Tensor], Tensor]:
    """The module's function with those of `parameters` that are named after it."""
    own = {
        key.removeprefix(f"{name}."): value for key, value in parameters.items() if key.startswith(f"{name}.")
    }
    return lambda x: functional_call(module, own, (x,))
