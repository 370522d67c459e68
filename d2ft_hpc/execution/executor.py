"""Attaches a plan to a model: its blocks read which heads to run from the row of the current micro-batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import numpy as np
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from d2ft_hpc.errors import PlanError
from d2ft_hpc.execution.block import BlockHeads, run_block
from d2ft_hpc.execution.gradients import (
    Owners,
    Reduction,
    one_point,
    owners_of,
    require_input_gradient,
    zero_gradient,
)
from d2ft_hpc.model.subnets import ParameterClass, SubnetMap
from d2ft_hpc.planning.plan import Operation, SkipPlan

EmbeddingPolicy = Literal["frozen", "complete_path", "trained"]
SharedPolicy = Literal["flow", "frozen"]


class PlanExecutor:
    """The plan that one model follows in training; evaluation mode is always dense.

    The blocks keep their class, their parameter names and their parameters: only their `forward` looks the plan up.
    Made by `attach`.
    """

    def __init__(self, model: VisionTransformer, embeddings: EmbeddingPolicy, compile: bool) -> None:
        self.subnets = SubnetMap.of(model)
        self.plan: SkipPlan | None = None
        """The plan in force; None means dense."""
        self._detach_incomplete = embeddings == "complete_path"
        self.trains_embeddings = embeddings == "trained"
        """Every micro-batch's gradient goes on below the blocks, whatever the plan."""
        self._slots: list[list[BlockHeads]] = []
        self._one_point: list[list[bool]] = []  # [slot][block]: gradients must be complete and in order
        self._slot: int | None = None
        self._slot_source: Callable[[], int] | None = None
        self._reduction = Reduction.AFTER_BACKWARD
        self.blocks: dict[int, Block] = {}
        """The blocks that follow this executor, by index; `link` adds them."""
        self._owners: dict[int, Owners] = {}
        self.lookup_seconds = 0.0
        """Time spent on following plans so far, on this rank: everything but the blocks' own work."""
        self._any_parameter = next(model.parameters())
        # Each shape is compiled for itself: kernels for shapes that may vary are slower.
        self._compiled = torch.compile(_dense_forward, dynamic=False) if compile else None

    def follow(self, slot_source: Callable[[], int] | None, reduction: Reduction) -> None:
        """Fits the executor to an engine that counts micro-batches itself, or reduces gradients during backward.

        slot_source: gives the place in the batch of the micro-batch that runs; None: `micro_batch` marks it.
        reduction: when the engine reduces gradients; without an engine, AFTER_BACKWARD.
        """
        self._slot_source, self._reduction = slot_source, reduction
        if reduction is Reduction.BY_BLOCK:
            require_input_gradient(self.blocks[0])

    def load(self, plan: SkipPlan, replica: int) -> None:
        """Makes the rows of `replica` in `plan` the ones that the next micro-batches follow.

        A plan that binds samples must run each sample in all heads or in none; the blocks then run densely on what
        the trainer gives them, which is the chosen samples alone.

        Raises PlanError if the plan was made for another number of blocks or heads, or for fewer replicas, or skips
        parts of samples.
        """
        if (plan.num_blocks, plan.num_heads) != self.subnets.shape:
            raise PlanError(
                f"the plan is for {plan.num_blocks} blocks x {plan.num_heads} heads, "
                f"the model has {self.subnets.num_blocks} x {self.subnets.num_heads}: solve a plan for this model"
            )
        if not 0 <= replica < plan.replicas:
            raise PlanError(f"the plan is for {plan.replicas} replicas and has no replica {replica}")
        rows = plan.for_replica(replica)
        if plan.binding == "sample":
            whole = np.isin(rows.reshape(len(rows), -1).sum(1), (0, Operation.FULL * rows[0].size))
            if not whole.all():
                raise PlanError(
                    "the plan binds samples and skips parts of some: only whole samples can be skipped"
                )
        self._slots = [] if plan.binding == "sample" else self._rows(rows)
        # Where all replicas run a block densely their gradients come alike, and nothing need be done.
        all_full = (plan.operations == Operation.FULL).all(axis=2)
        all_dense = all_full.reshape(plan.slots, plan.replicas, -1).all(axis=1)
        self._one_point = [
            [self._reduction.happens_in(slot, plan.slots) and not dense for dense in all_dense[slot]]
            for slot in range(len(self._slots))
        ]
        self._owners = {index: owners_of(block) for index, block in self.blocks.items()}
        self.plan = plan

    @property
    def is_dense(self) -> bool:
        """Whether every block runs densely on every micro-batch; it may be one of chosen samples."""
        return self.plan is None or self.plan.binding == "sample" or self.plan.is_dense

    def unload(self) -> None:
        """Back to dense training."""
        self.plan, self._slots, self._one_point = None, [], []

    @contextmanager
    def micro_batch(self, slot: int) -> Iterator[None]:
        """Marks the forward *and* the backward of the micro-batch in place `slot` of the batch.

        Backward belongs inside because activation checkpointing runs the blocks again there.
        """
        if self._slots and not 0 <= slot < len(self._slots):
            raise PlanError(
                f"micro-batch {slot} has no row in a plan of {len(self._slots)} micro-batches a replica"
            )
        before, self._slot = self._slot, slot
        try:
            yield
        finally:
            self._slot = before

    @property
    def slot(self) -> int | None:
        """The place in the batch of the micro-batch that runs now; None outside of any."""
        return self._slot if self._slot_source is None else self._slot_source()

    @contextmanager
    def temporarily(self, operations: np.ndarray) -> Iterator[None]:
        """Every micro-batch inside follows `operations`, uint8 [block, head]; afterwards the plan is as before."""
        before = self._slots, self._one_point, self._slot, self._slot_source
        self._slots, self._one_point = self._rows(operations[None]), [[False] * len(operations)]
        self._slot, self._slot_source = 0, None
        try:
            yield
        finally:
            self._slots, self._one_point, self._slot, self._slot_source = before

    def run(self, block: Block, index: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Block `index` under the current row; `args` are the block's own."""
        if not self._slots or not block.training:
            return self._run(block, index, None, x, *args, **kwargs)
        start = time.perf_counter()
        slot = self.slot
        if slot is None:
            raise PlanError(
                "a model with a plan was called in training mode without saying which micro-batch this is: "
                "wrap forward and backward in `with executor.micro_batch(slot):`, or call executor.unload()"
            )
        heads = self._slots[slot][index]
        if index == 0 and self._detach_incomplete and not all(each.is_dense for each in self._slots[slot]):
            # Embeddings take no part in this micro-batch; a reduction during backward still waits for them.
            x = x.detach() if self._reduction is Reduction.AFTER_BACKWARD else zero_gradient(x)
        if self._one_point[slot][index]:
            with one_point(self._owners[index], x, gives_gradients=heads.full is not None) as x:
                self.lookup_seconds += time.perf_counter() - start
                return self._run(block, index, heads, x, *args, **kwargs)
        self.lookup_seconds += time.perf_counter() - start
        return self._run(block, index, heads, x, *args, **kwargs)

    def _run(
        self, block: Block, index: int, heads: BlockHeads | None, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Block `index` with these heads; None: all of them."""
        if heads is None or heads.is_dense:
            return self._run_dense(block, x, *args, **kwargs)
        return run_block(block, x, heads, self.subnets.head_axes, *args, **kwargs)

    def link(self, block: Block, index: int) -> None:
        """Lets a block of the model, its copy or its part follow this executor as block `index`."""
        self.blocks[index] = block
        block._d2ft = _BlockLink(self, index)
        block.forward = MethodType(_planned_forward, block)

    def _run_dense(self, block: Block, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A mode that counts operators sees none in a compiled block, and one that is on when a block would be compiled
        # keeps it from being compiled for good.
        if self._compiled is None or _get_current_dispatch_mode() is not None:
            return _dense_forward(block, x, *args, **kwargs)
        result: Tensor = self._compiled(block, x, *args, **kwargs)
        return result

    def _rows(self, operations: np.ndarray) -> list[list[BlockHeads]]:
        return [[self._heads(cells, index) for index, cells in enumerate(row)] for row in operations]

    def _heads(self, cells: np.ndarray, index: int) -> BlockHeads:
        """What block `index` runs. cells: uint8 [head]."""

        def indices(operation: Operation) -> Tensor | None:
            (chosen,) = np.nonzero(cells == operation)
            return torch.from_numpy(chosen).to(self._any_parameter.device) if chosen.size else None

        full, forward_only = indices(Operation.FULL), indices(Operation.FORWARD_ONLY)
        return BlockHeads(full, forward_only, is_dense=full is not None and full.numel() == cells.size)


class _BlockLink:
    """What a block keeps: its executor and its place. A plain object, so that the module tree stays timm's."""

    def __init__(self, executor: PlanExecutor, index: int) -> None:
        self.executor, self.index = executor, index


def attach(
    model: VisionTransformer,
    *,
    embeddings: EmbeddingPolicy = "frozen",
    shared: SharedPolicy = "flow",
    compile: bool = False,
) -> PlanExecutor:
    """Lets a timm VisionTransformer follow skip plans.

    embeddings: what becomes of the parameters below every block, whose gradient is biased by every skip above them:
        "frozen" (default), "complete_path" (trained by the micro-batches that are FULL everywhere) or "trained".
    shared: norms, LayerScale, row biases of the blocks: "flow" (trained by what flows through FULL heads) or "frozen".
    compile: whether dense blocks run through torch.compile, one set of kernels for each shape of input.
    The classifier always trains; parameters that are frozen already stay so.

    Raises UnsupportedModelError where the model cannot be cut by head.
    """
    if any(hasattr(block, "_d2ft") for block in model.blocks):
        raise PlanError("the model has an executor already: attach once and keep what attach returned")
    executor = PlanExecutor(model, embeddings, compile)
    frozen = {ParameterClass.EMBEDDING: embeddings == "frozen", ParameterClass.SHARED: shared == "frozen"}
    for name, parameter in model.named_parameters():
        if frozen.get(executor.subnets.classify(name), False):
            parameter.requires_grad_(False)
    for index, block in enumerate(model.blocks):
        executor.link(block, index)
    return executor


def _planned_forward(block: Block, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    link: _BlockLink = block._d2ft
    return link.executor.run(block, link.index, x, *args, **kwargs)


def _dense_forward(block: Block, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = type(block).forward(block, x, *args, **kwargs)
    return result
