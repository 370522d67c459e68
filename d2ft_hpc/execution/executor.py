"""Attaches a plan to a model: its blocks read which heads to run from the row of the current micro-batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any, Literal

import numpy as np
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from d2ft_hpc.errors import PlanError
from d2ft_hpc.execution.block import BlockHeads, ChosenHeads, run_block
from d2ft_hpc.execution.gradients import (
    Owners,
    Reduction,
    one_point,
    owners_of,
    require_input_gradient,
    zero_gradient,
)
from d2ft_hpc.model.lora import unwrapped
from d2ft_hpc.model.subnets import ParameterClass, SubnetMap
from d2ft_hpc.planning.plan import Operation, SkipPlan

EmbeddingPolicy = Literal["frozen", "complete_path", "trained"]
SharedPolicy = Literal["flow", "frozen"]

MOST_SHAPES = 8
"""Kernels that torch.compile keeps for one function."""


class PlanExecutor:
    """The plan that one model follows in training; evaluation mode is always dense.

    The blocks keep their class, their parameter names and their parameters: only their `forward` looks the plan up.
    Made by `attach`.
    """

    def __init__(
        self, model: VisionTransformer, embeddings: EmbeddingPolicy, rescale: bool, compile: bool
    ) -> None:
        self.subnets = SubnetMap.of(model)
        self.plan: SkipPlan | None = None
        """The plan in force; None means dense."""
        self.detach_incomplete = embeddings == "complete_path"
        """Embeddings take part in micro-batches that are FULL everywhere only; block 0 sees to it."""
        self.trains_embeddings = embeddings == "trained"
        """Every micro-batch's gradient goes on below the blocks, whatever the plan."""
        self._rescale = rescale
        self._scales = np.ones(self.subnets.num_blocks)  # [block], of the plan in force
        self._slots: list[list[BlockHeads]] = []
        self._complete: list[bool] = []  # [slot]: FULL everywhere
        self._one_point: list[list[bool]] = []  # [slot][block]: gradients must be complete and in order
        self._slot: int | None = None
        self._slot_source: Callable[[], int] | None = None
        self._reduction = Reduction.AFTER_BACKWARD
        self._check: Callable[[SkipPlan], None] | None = None
        self.blocks: dict[int, Block] = {}
        """The blocks that follow this executor, by index; `link` adds them."""
        self._owners: dict[int, Owners] = {}
        self._fusible: dict[int, bool] = {}
        self.has_few_shapes = True
        """Micro-batches of the plan in force have at most 8 different `shapes`, what torch.compile keeps."""
        self.lookup_seconds = 0.0
        """Time spent on following plans so far, on this rank: everything but the blocks' own work."""
        self._any_parameter = next(model.parameters())
        # Each shape is compiled for itself: kernels for shapes that may vary are slower.
        self._compiled = torch.compile(_dense_forward, dynamic=False) if compile else None
        self._compiled_heads = torch.compile(run_block, dynamic=False) if compile else None

    def follow(
        self,
        slot_source: Callable[[], int] | None,
        reduction: Reduction,
        check: Callable[[SkipPlan], None] | None = None,
    ) -> None:
        """Fits the executor to an engine that counts micro-batches itself, or reduces gradients during backward.

        slot_source: gives the place in the batch of the micro-batch that runs; None: `micro_batch` marks it.
        reduction: when the engine reduces gradients; without an engine, AFTER_BACKWARD.
        check: raises PlanError or ConfigError where the engine cannot run a plan; `load` calls it.
        """
        self._slot_source, self._reduction, self._check = slot_source, reduction, check
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
        if self._check is not None:
            self._check(plan)
        if not 0 <= replica < plan.replicas:
            raise PlanError(f"the plan is for {plan.replicas} replicas and has no replica {replica}")
        rows = plan.for_replica(replica)
        if plan.binding == "sample":
            whole = np.isin(rows.reshape(len(rows), -1).sum(1), (0, Operation.FULL * rows[0].size))
            if not whole.all():
                raise PlanError(
                    "the plan binds samples and skips parts of some: only whole samples can be skipped"
                )
        if self._rescale:
            active = (rows != Operation.SHORTCUT).mean(axis=(0, 2))
            self._scales = np.where(active > 0, 1 / np.maximum(active, 1e-9), 1.0)
        self._slots = [] if plan.binding == "sample" else self._rows(rows)
        self._complete = [bool((row == Operation.FULL).all()) for row in rows]
        # Where all replicas run a block densely their gradients come alike, and nothing need be done.
        all_full = (plan.operations == Operation.FULL).all(axis=2)
        all_dense = all_full.reshape(plan.slots, plan.replicas, -1).all(axis=1)
        self._one_point = [
            [self._reduction.happens_in(slot, plan.slots) and not dense for dense in all_dense[slot]]
            for slot in range(len(self._slots))
        ]
        self._owners = {index: owners_of(block) for index, block in self.blocks.items()}
        self._fusible.clear()
        self.has_few_shapes = len({self.shapes(slot) for slot in range(len(self._slots))}) <= MOST_SHAPES
        self.plan = plan

    @property
    def is_dense(self) -> bool:
        """Whether every block runs densely on every micro-batch; it may be one of chosen samples."""
        return self.plan is None or self.plan.binding == "sample" or self.plan.is_dense

    def unload(self) -> None:
        """Back to dense training."""
        self.plan, self._slots, self._complete, self._one_point = None, [], [], []
        self._scales = np.ones(self.subnets.num_blocks)

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
        before = (
            self.plan,
            self._scales,
            self._slots,
            self._complete,
            self._one_point,
            self._slot,
            self._slot_source,
        )
        self.plan, self._scales = None, np.ones(len(operations))
        self._slots, self._one_point = self._rows(operations[None]), [[False] * len(operations)]
        self._complete, self._slot, self._slot_source = [bool((operations == Operation.FULL).all())], 0, None
        try:
            yield
        finally:
            (
                self.plan,
                self._scales,
                self._slots,
                self._complete,
                self._one_point,
                self._slot,
                self._slot_source,
            ) = before

    def run(self, block: Block, index: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Block `index` under the current row; `args` are the block's own."""
        if not self._slots or not block.training:
            return self._run(block, index, None, x, *args, **kwargs)
        start = _clock()
        slot = self.slot
        if slot is None:
            raise PlanError(
                "a model with a plan was called in training mode without saying which micro-batch this is: "
                "wrap forward and backward in `with executor.micro_batch(slot):`, or call executor.unload()"
            )
        heads = self._slots[slot][index]
        if index == 0 and self.detach_incomplete and not self._complete[slot]:
            # Embeddings take no part in this micro-batch; a reduction during backward still waits for them.
            x = x.detach() if self._reduction is Reduction.AFTER_BACKWARD else zero_gradient(x)
        if self._one_point[slot][index]:
            with one_point(self._owners[index], x, gives_gradients=heads.trains) as x:
                self.lookup_seconds += _clock() - start
                return self._run(block, index, heads, x, *args, **kwargs)
        self.lookup_seconds += _clock() - start
        return self._run(block, index, heads, x, *args, **kwargs)

    def _run(
        self, block: Block, index: int, heads: BlockHeads | None, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Block `index` with these heads; None: all of them."""
        if heads is None or heads.is_dense:
            return self._run_dense(block, x, *args, **kwargs)
        if x.is_cuda and self._is_fused(index, heads):
            result: Tensor = fused().run_fused(
                block, x, heads.chosen, self._following(index), *args, **kwargs
            )
            return result
        if (
            self._compiled_heads is None
            or not self.has_few_shapes
            or _get_current_dispatch_mode() is not None
        ):
            return run_block(block, x, heads, self.subnets.head_axes, *args, **kwargs)
        result = self._compiled_heads(block, x, heads, self.subnets.head_axes, *args, **kwargs)
        return result

    def _is_fused(self, index: int, heads: BlockHeads) -> bool:
        if (
            heads.full is None
            or heads.chosen is None
            or heads.is_dense
            or heads.scale != 1
            or fused() is None
        ):
            return False
        if index not in self._fusible:
            self._fusible[index] = fused().fits(self.blocks[index])
        return self._fusible[index]

    def _following(self, index: int) -> Block | None:
        """The block above block `index`, if its first norm may be computed with the block's last sum."""
        slot, above = self.slot, index + 1
        if slot is None or above not in self.blocks or self._one_point[slot][above]:
            return None
        if self._reduction is Reduction.BY_BLOCK:
            return None  # the engine gathers weights block by block, and has not gathered that one's
        return self.blocks[above] if self._is_fused(above, self._slots[slot][above]) else None

    def shapes(self, slot: int) -> tuple[tuple[int, int, float], ...]:
        """How many heads are FULL and how many FORWARD_ONLY in each block of the micro-batch in place `slot`, and what
        the block is scaled by."""
        return tuple(
            (_count(heads.full), _count(heads.forward_only), heads.scale) for heads in self._slots[slot]
        )

    def indices(self, slot: int) -> Tensor:
        """Which heads the micro-batch in place `slot` runs, int64 on the model's device; `reading` takes it."""
        return torch.cat([each for heads in self._slots[slot] for each in _indices(heads)])

    @contextmanager
    def reading(self, slot: int, indices: Tensor) -> Iterator[None]:
        """Inside, the micro-batch in place `slot` runs the heads of `indices`, in numbers like its own."""
        own, rest = self._slots[slot], indices
        read = []
        for heads in own:
            order, places = (each.numel() for each in _indices(heads))
            its_places = rest[order : order + places]
            read.append(_block_heads(rest[:order], _count(heads.full), its_places, heads.scale))
            rest = rest[order + places :]
        self._slots[slot] = read
        try:
            yield
        finally:
            self._slots[slot] = own

    def link(self, block: Block, index: int) -> None:
        """Lets a block of the model, its copy or its part follow this executor as block `index`."""
        self.blocks[index] = block
        block._d2ft = _BlockLink(self, index)
        block.forward = MethodType(_planned_forward, block)

    def _run_dense(self, block: Block, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A mode that counts operators sees none in a compiled block, and one that is on when a block would be compiled
        # keeps it from being compiled for good.
        if (
            self._compiled is None
            or torch.compiler.is_compiling()
            or _get_current_dispatch_mode() is not None
        ):
            return _dense_forward(block, x, *args, **kwargs)
        result: Tensor = self._compiled(block, x, *args, **kwargs)
        return result

    def _rows(self, operations: np.ndarray) -> list[list[BlockHeads]]:
        return [[self._heads(cells, index) for index, cells in enumerate(row)] for row in operations]

    def _heads(self, cells: np.ndarray, index: int) -> BlockHeads:
        """What block `index` runs. cells: uint8 [head]."""

        full, forward_only = (
            np.flatnonzero(cells == operation) for operation in (Operation.FULL, Operation.FORWARD_ONLY)
        )
        places = np.full(cells.size, -1)
        places[full] = np.arange(full.size)
        indices = torch.from_numpy(np.concatenate([full, forward_only, places])).to(
            self._any_parameter.device
        )
        order, at = indices.split([full.size + forward_only.size, cells.size])
        return _block_heads(order, full.size, at, float(self._scales[index]))


def _block_heads(order: Tensor, full: int, places: Tensor, scale: float) -> BlockHeads:
    return BlockHeads(
        order[:full] if full else None,
        order[full:] if order.numel() > full else None,
        is_dense=full == places.numel() and scale == 1,
        chosen=ChosenHeads(order, full, places),
        scale=scale,
    )


@cache
def fused() -> Any:
    """The module of fused blocks; None where Triton is not installed."""
    try:
        from d2ft_hpc.execution import fused as module
    except ImportError:
        return None
    return module


def _clock() -> float:
    """torch.compile traces what is between two readings, without the clock."""
    return 0.0 if torch.compiler.is_compiling() else time.perf_counter()


def _count(heads: Tensor | None) -> int:
    return 0 if heads is None else heads.numel()


def _indices(heads: BlockHeads) -> tuple[Tensor, Tensor]:
    """A block's order and places of heads."""
    if heads.chosen is None:
        raise PlanError("heads that tensor-parallel ranks share have no indices of their own")
    return heads.chosen.order, heads.chosen.places


class _BlockLink:
    """What a block keeps: its executor and its place. A plain object, so that the module tree stays timm's."""

    def __init__(self, executor: PlanExecutor, index: int) -> None:
        self.executor, self.index = executor, index


def attach(
    model: Any,
    *,
    embeddings: EmbeddingPolicy = "frozen",
    shared: SharedPolicy = "flow",
    rescale: bool = False,
    compile: bool = False,
) -> PlanExecutor:
    """Lets a timm VisionTransformer follow skip plans, also one inside peft's wrapper.

    embeddings: what becomes of the parameters below every block, whose gradient is biased by every skip above them:
        "frozen" (default), "complete_path" (trained by the micro-batches that are FULL everywhere) or "trained".
    shared: norms, LayerScale, row biases of the blocks: "flow" (trained by what flows through FULL heads) or "frozen".
    rescale: whether what a block's branches add is multiplied by its cells over those that are not SHORTCUT, over the
        batch of a replica, as stochastic depth does (arXiv 1603.09382).
    compile: whether dense blocks run through torch.compile, one set of kernels for each shape of input.
    The classifier always trains; parameters that are frozen already stay so.

    Raises UnsupportedModelError where the model cannot be cut by head.
    """
    model = unwrapped(model)
    if any(hasattr(block, "_d2ft") for block in getattr(model, "blocks", ())):
        raise PlanError("the model has an executor already: attach once and keep what attach returned")
    executor = PlanExecutor(model, embeddings, rescale, compile)
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
