"""The plan that a model follows: its blocks read which heads to run from the row of the current micro-batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from d2ft_hpc.errors import ConfigError, PlanError
from d2ft_hpc.execution.block import BlockHeads
from d2ft_hpc.execution.block_graphs import BlockGraphs, GradientPlace
from d2ft_hpc.execution.block_runner import BlockRunner
from d2ft_hpc.execution.compilation import allow_kernels_of
from d2ft_hpc.execution.copies import set_outside_copies
from d2ft_hpc.execution.flat_parameters import FlatParameters
from d2ft_hpc.execution.gradients import (
    Owners,
    Reduction,
    in_backward,
    one_point,
    owners_of,
    require_input_gradient,
    zero_gradient,
)
from d2ft_hpc.execution.graph_replay import GraphReplay
from d2ft_hpc.execution.image_scaling import ImageScaling
from d2ft_hpc.execution.rows import Row, choose_heads
from d2ft_hpc.families.family import KernelParts
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.planning.plan import Grid, Operation, SkipPlan

EmbeddingPolicy = Literal["frozen", "complete_path", "trained"]


class PlanExecutor:
    """The plan that one model follows in training; evaluation mode, and what takes no gradient, is always dense.

    The blocks keep their class, their parameter names and their parameters: only their `forward` looks the plan up.
    Made by `attach`.
    """

    def __init__(
        self,
        subnets: SubnetMap,
        embeddings: EmbeddingPolicy,
        compile: bool,
        cuda_graphs: bool = False,
        recomputes: Callable[[], bool] = lambda: False,
    ) -> None:
        """recomputes: whether blocks run again in the backward; then they do not run as graphs."""
        self.subnets = subnets
        self.plan: SkipPlan | None = None
        """The plan in force; None means dense."""
        self.detach_incomplete = embeddings == "complete_path"
        """Whether embeddings train only by micro-batches that are FULL everywhere; block 0 sees to it."""
        self.trains_embeddings = embeddings == "trained"
        """Whether every micro-batch's gradient goes on below the blocks, whatever the plan."""
        self.rows: list[Row] = []
        """Rows of the plan in force, by slot; none where every micro-batch is dense."""
        self._slot: int | None = None
        self._slot_source: Callable[[], int] | None = None
        self._reduction = Reduction.AFTER_BACKWARD
        self._reduces: Callable[[nn.Module], bool] | None = None
        self.trained_beside: list[str] = []
        """Parameters below the blocks that get gradients through the blocks' other arguments; skipped blocks give
        none."""
        self._check: Callable[[SkipPlan], None] | None = None
        self.blocks: dict[int, nn.Module] = {}
        """The blocks that follow this executor, by index; `link` adds them. Their parameters are looked up when they
        are needed: a model that was built without memory, or loaded with assign=True, gets others."""
        self.flat: FlatParameters | None = None
        """In which an engine has put the blocks' parameters, if it has."""
        self._owners: dict[int, Owners] = {}
        self._runner = BlockRunner(subnets, compile)
        self._replay = GraphReplay(recomputes) if cuda_graphs else None
        self.images = ImageScaling(subnets.family, self.grid)
        self.micro_batch_shapes = 0
        """Different shapes of this replica's micro-batches under the plan in force."""
        self.forward_trains = False
        """Whether the forward under way is one that trains, where a loop says so."""
        self.lookup_seconds = 0.0
        """Seconds that following plans has taken so far on this rank, without the blocks' own work."""

    def bind(
        self,
        slot_source: Callable[[], int] | None,
        reduction: Reduction,
        check: Callable[[SkipPlan], None] | None = None,
        reduces: Callable[[nn.Module], bool] | None = None,
        gradient_place: GradientPlace = GradientPlace.COPIED,
    ) -> None:
        """Fits the executor to an engine that counts micro-batches itself, or reduces gradients during backward.

        slot_source: gives the place in the batch of the micro-batch that runs; None: `micro_batch` marks it.
        reduction: when the engine reduces gradients; without an engine, AFTER_BACKWARD.
        check: raises PlanError or ConfigError where the engine cannot run a plan; `activate` calls it.
        reduces: in a block's forward, whether this micro-batch's backward reduces the block's gradients, where the loop
            can say that anew each time, as at the end of an epoch in an incomplete batch; None: as `reduction` says.
        gradient_place: where blocks that run as CUDA graphs leave gradients.

        Raises ConfigError where parameters below the blocks would get other gradients on other replicas.
        """
        if self.trained_beside and reduction is not Reduction.AFTER_BACKWARD:
            raise ConfigError(
                f"{self.trained_beside[0]} takes its gradient from the blocks that run, which differ between replicas "
                f"that reduce {reduction.value}: attach(model, embeddings='frozen'), or model.embeddings=frozen"
            )
        self._slot_source, self._reduction, self._check = slot_source, reduction, check
        self._reduces = reduces
        if self._replay is not None:
            self._replay.graphs = BlockGraphs(self._gathers(self.blocks[0]), gradient_place)
        if reduction is Reduction.BY_BLOCK and self.trains.any():
            # Below it nothing trains, and a gradient that went through would take the time of a backward pass.
            require_input_gradient(self.blocks[int(self.trains.argmax())])

    def activate(self, plan: SkipPlan, replica: int) -> None:
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
        grids = [plan.grid_of(slot * plan.replicas + replica) for slot in range(plan.slots)]
        self._require_no_hooks(plan)
        if plan.grids is not None:
            self.images.take_any_size(plan)
        if plan.binding == "sample":
            whole = np.isin(rows.reshape(len(rows), -1).sum(1), (0, Operation.FULL * rows[0].size))
            if not whole.all():
                raise PlanError(
                    "the plan binds samples and skips parts of some: only whole samples can be skipped"
                )
        all_full = (plan.operations == Operation.FULL).all(axis=2)
        all_dense = all_full.reshape(plan.slots, plan.replicas, -1).all(axis=1)
        self.rows = [
            self._row(cells, sparse, grid)
            for cells, sparse, grid in zip(rows, self._sparse(all_dense), grids, strict=True)
            if plan.binding == "slot"
        ]
        self._owners = {index: self._owners_of(index) for index in self.blocks}
        self._runner.forget_parts()
        self._count_block_shapes()
        self.micro_batch_shapes = len({row.shape for row in self.rows})
        allow_kernels_of(len(self.rows))
        self.plan = plan

    def _require_no_hooks(self, plan: SkipPlan) -> None:
        """Raises PlanError where modules that a block does not call while heads are skipped would do more than the
        library's, as by torch's weight norm and pruning."""
        gathers_by_hooks = self._reduction is Reduction.BY_BLOCK
        if plan.binding == "sample" or gathers_by_hooks:
            return
        for index in np.flatnonzero((plan.operations != Operation.FULL).any(axis=(0, 2))).tolist():
            if index not in self.blocks:
                continue
            modules = dict(self.blocks[index].named_modules())
            for name in (self.subnets.family.attention, "mlp", *self.subnets.layers):
                hooks = (*modules[name]._forward_pre_hooks.values(), *modules[name]._forward_hooks.values())
                what = "a hook" if any(map(_does_something, hooks)) else ""
                what = "a forward of its own" if "forward" in vars(modules[name]) else what
                if what:
                    raise PlanError(
                        f"{name} of block {index} has {what}, which would not run where the plan skips heads: remove "
                        f"it, or use planner='tokens', which skips none"
                    )

    @property
    def trains(self) -> np.ndarray:
        """Whether some parameter of each block is not frozen, bool [block]. Plans do not decide about blocks that do
        not train: a skip would save no weight gradient there, and no score says what it would cost."""
        return np.array(
            [
                any(parameter.requires_grad for parameter in self.blocks[index].parameters())
                for index in range(self.subnets.num_blocks)
            ]
        )

    def uniform(self, operation: Operation) -> np.ndarray:
        """uint8 [block, head]: `operation` in all heads of blocks that train, FULL in the others."""
        operations = np.full(self.subnets.shape, Operation.FULL, dtype=np.uint8)
        operations[self.trains] = operation
        return operations

    @property
    def block_shapes(self) -> int:
        """Kernels of blocks that skip heads and are not fused, under this and earlier plans, if torch.compile makes
        them: one for each different shape of heads, for inputs with and without gradient, for gradients at one point,
        for each rate of DropPath. It makes them for plans with which they are at most 8; blocks of other plans run
        eagerly."""
        return self._runner.shapes

    def grid(self) -> Grid | None:
        """The grid of the images of the micro-batch that runs; None: they stay as they are."""
        if not self.rows:
            return None
        if self.slot is None:
            raise _no_slot()
        return self.rows[self.slot].grid

    @property
    def makes_graphs(self) -> bool:
        """Whether blocks run as CUDA graphs where they can."""
        return self._replay is not None

    @property
    def compiles(self) -> bool:
        """Whether torch.compile makes kernels of blocks."""
        return self._runner.compiles

    @property
    def is_dense(self) -> bool:
        """Whether every block runs densely on every micro-batch; it may be one of chosen samples."""
        return self.plan is None or self.plan.binding == "sample" or self.plan.is_dense

    def deactivate(self) -> None:
        """Back to dense training."""
        self.plan, self.rows, self._runner.shapes, self.micro_batch_shapes = None, [], 0, 0

    @contextmanager
    def micro_batch(self, slot: int) -> Iterator[None]:
        """Marks the forward *and* the backward of the micro-batch in place `slot` of the batch.

        Backward belongs inside because activation checkpointing runs the blocks again there.
        """
        if self.rows and not 0 <= slot < len(self.rows):
            raise PlanError(
                f"micro-batch {slot} has no row in a plan of {len(self.rows)} micro-batches a replica"
            )
        before, self._slot = self._slot, slot
        try:
            yield
        finally:
            self._slot = before

    @property
    def slot(self) -> int | None:
        """The place in the batch of the micro-batch that runs now, as `micro_batch` or else the loop says; None
        outside of any."""
        return self._slot if self._slot is not None or self._slot_source is None else self._slot_source()

    def slot_of(self, x: Tensor) -> int | None:
        """The slot of the micro-batch that a block's input belongs to. A block that runs again in the backward
        (activation checkpointing) gets the tensor that it had, and others may have run forward since."""
        slot: int | None = getattr(x, _SLOT, None) if in_backward() else None
        return self.slot if slot is None else slot

    def _require_frozen(self, block: nn.Module, index: int) -> None:
        if any(parameter.requires_grad for parameter in block.parameters()):
            raise PlanError(
                f"block {index} takes no gradient in a forward that does, though its parameters are to train: give "
                f"checkpoint() use_reentrant=False, or freeze the block before attach"
            )

    @contextmanager
    def temporarily(self, operations: np.ndarray) -> Iterator[None]:
        """Inside, every micro-batch follows `operations`, uint8 [block, head]; afterwards the plan is as before."""
        before = self.plan, self.rows, self._runner.shapes, self._slot, self._slot_source
        self.plan, self.rows = None, [self._row(operations, np.zeros(len(operations), bool))]
        self._count_block_shapes()
        self._slot, self._slot_source = 0, None
        try:
            yield
        finally:
            self.plan, self.rows, self._runner.shapes, self._slot, self._slot_source = before

    def run(self, block: nn.Module, index: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Block `index` under the current row; `args` are the block's own."""
        takes_gradient = block.training and torch.is_grad_enabled()
        if not (self.rows and takes_gradient):
            if self.forward_trains and block.training and not takes_gradient:
                self._require_frozen(block, index)
            replayed = self._replayed(block, index, None, x, args, kwargs)
            return self._run(block, index, None, x, *args, **kwargs) if replayed is None else replayed
        slot = self.slot_of(x)
        if slot is None:
            raise _no_slot()
        with nullcontext() if slot == self.slot else self.micro_batch(slot):
            output = self._run_planned(block, index, slot, x, *args, **kwargs)
        if not torch.compiler.is_compiling():
            for tensor in (x, output):
                setattr(tensor, _SLOT, slot)
        return output

    def _run_planned(
        self, block: nn.Module, index: int, slot: int, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        start = _clock()
        if index == 0 and self._reduction is Reduction.AFTER_BACKWARD and _reduces_in_backward(block):
            raise PlanError(
                "the model trains inside DistributedDataParallel or FSDP2, whose ranks drift apart or hang where they "
                "skip different heads: call d2ft_hpc.prepare(model, executor) after wrapping it"
            )
        row = self.rows[slot]
        if row.indices.device != x.device:
            row = self.rows[slot] = row.reading(row.indices.to(x.device))
        heads = row.heads[index]
        if index == 0 and self.detach_incomplete and not row.is_complete:
            # Embeddings take no part in this micro-batch; a reduction during backward still waits for them.
            x = x.detach() if self._reduction is Reduction.AFTER_BACKWARD else zero_gradient(x)
        self.lookup_seconds += _clock() - start
        replayed = self._replayed(block, index, slot, x, args, kwargs)
        if replayed is not None:
            return replayed
        start = _clock()
        if self._at_one_point(slot, index):
            with one_point(self._owners[index], x, gives_gradients=heads.trains) as x:
                self.lookup_seconds += _clock() - start
                return self._run(block, index, heads, x, *args, **kwargs)
        self.lookup_seconds += _clock() - start
        return self._run(block, index, heads, x, *args, **kwargs)

    def _run(
        self, block: nn.Module, index: int, heads: BlockHeads | None, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Block `index` with these heads; None: all of them."""
        with nullcontext() if self.flat is None else self.flat.placed(index):
            return self._runner.run(block, index, heads, self._for_kernels, x, *args, **kwargs)

    def _replayed(
        self, block: nn.Module, index: int, slot: int | None, x: Tensor, args: Any, kwargs: Any
    ) -> Tensor | None:
        """Block `index` under the row of `slot`, or densely, through CUDA graphs; None where it has to run without."""
        if self._replay is None or not block.training:
            return None
        if self.flat is not None and self.flat.is_unflattened:
            return None  # graphs read the flat parameters

        def at_one_point(index: int) -> bool:
            return slot is not None and self._at_one_point(slot, index)

        def compute(index: int, heads: BlockHeads | None, x: Tensor, args: Any, kwargs: Any) -> Tensor:
            return self._run(self.blocks[index], index, heads, x, *args, **kwargs)

        row, owners = None if slot is None else self.rows[slot], partial(self._owners_of, frozen_too=True)
        return self._replay.run(index, x, (args, kwargs), row, self.blocks, owners, at_one_point, compute)

    def _owners_of(self, index: int, *, frozen_too: bool = False) -> Owners:
        """As `owners_of`, with the flat parameters where the block's own are parts of them."""
        owners = owners_of(self.blocks[index], frozen_too=frozen_too)
        return owners if self.flat is None else self.flat.owners(index, owners)

    def _for_kernels(self, block: nn.Module, index: int) -> tuple[KernelParts | None, bool]:
        """`following` and `keeps` of `run_fused`."""
        return self._following(index), not self._gathers(block)

    def _following(self, index: int) -> KernelParts | None:
        """Kernel parts of the block above block `index`, if its first norm may be computed with that one's last sum."""
        slot, above = self.slot, index + 1
        if slot is None or above not in self.blocks:
            return None
        if self._at_one_point(slot, above) and not (self._replay is not None and self._replay.captures):
            return None  # that block computes with stand-ins
        if self._reduction is Reduction.BY_BLOCK:
            return None  # the engine gathers weights block by block, and has not gathered that one's
        return self._runner.fused_parts(self.blocks[above], above, self.rows[slot].heads[above])

    def _gathers(self, block: nn.Module) -> bool:
        """Whether an engine puts a block's weights elsewhere in memory for each pass."""
        return self._reduction is Reduction.BY_BLOCK or isinstance(block, FSDPModule)

    def _at_one_point(self, slot: int, index: int) -> bool:
        """Whether the gradients of block `index` must be complete and ordered in this micro-batch's backward."""
        if not self.rows[slot].sparse[index]:
            return False
        if self._reduces is not None:
            return self._reduces(self.blocks[index])
        return any(self._reduction.may_happen_in(slot, len(self.rows)))

    @contextmanager
    def reading(self, slot: int, indices: Tensor) -> Iterator[None]:
        """Inside, the micro-batch in place `slot` runs the heads of `indices`, in the same numbers as its own."""
        own = self.rows[slot]
        self.rows[slot] = own.reading(indices)
        try:
            yield
        finally:
            self.rows[slot] = own

    def link(self, block: nn.Module, index: int) -> None:
        """Lets a block of the model, its copy or its part follow this executor as block `index`.

        Copies and pickles of the block are dense and follow nothing.
        """
        self.blocks[index] = block
        forward = MethodType(_planned_forward, block)
        set_outside_copies(block, {"_d2ft": BlockLink(self, index), "forward": forward})

    @property
    def _device(self) -> torch.device:
        """The device of the parameters; the CPU while they have no memory."""
        device = next(next(iter(self.blocks.values())).parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    def _sparse(self, all_dense: np.ndarray) -> np.ndarray:
        """Where replicas may have other gradients of a block, or in another order, bool [slot, block].

        all_dense: bool [slot, block], where all replicas run the block densely.
        """
        return ~all_dense

    def _row(self, operations: np.ndarray, sparse: np.ndarray, grid: Grid | None = None) -> Row:
        """operations: uint8 [block, head]; sparse: [block]. grid: patches of the images."""
        is_complete = bool((operations == Operation.FULL).all())
        return Row(*self._choose(operations), is_complete, sparse.tolist(), grid)

    def _choose(self, operations: np.ndarray) -> tuple[Tensor, Sequence[BlockHeads]]:
        return choose_heads(list(operations), self._device)

    def _count_block_shapes(self) -> None:
        is_passed_below = (
            self.trains_embeddings
            or self._reduction is Reduction.BY_BLOCK
            or (self.detach_incomplete and self._reduction is not Reduction.AFTER_BACKWARD)
        )
        self._runner.count_shapes(self.rows, self.blocks, self._device, self._reduction, is_passed_below)


_SLOT = "_d2ft_slot"
"""An attribute of blocks' inputs and outputs in training."""


def _no_slot() -> PlanError:
    return PlanError(
        "a model with a plan was called in training mode without saying which micro-batch this is: wrap forward and "
        "backward in `with executor.micro_batch(slot):`, or call executor.deactivate()"
    )


def _does_something(hook: Callable[..., Any]) -> bool:
    """Not if it is one of transformers', which keep what a forward asks for; `require_skippable` refuses to ask."""
    return hook.__module__ != "transformers.utils.output_capturing"


def _clock() -> float:
    """Reads the clock; torch.compile traces what is between two readings, but not the readings."""
    return 0.0 if torch.compiler.is_compiling() else time.perf_counter()


def _reduces_in_backward(block: nn.Module) -> bool:
    """Whether torch's DDP, or FSDP2, runs the model."""
    if torch.compiler.is_compiling():
        return False
    return isinstance(block, FSDPModule) or DistributedDataParallel._active_ddp_module is not None


class BlockLink:
    """What a block keeps: its executor and its place. A plain object, so that the module tree stays as it was."""

    def __init__(self, executor: PlanExecutor, index: int) -> None:
        self.executor, self.index = executor, index


def _planned_forward(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    link: BlockLink = cast(Any, block)._d2ft
    return link.executor.run(block, link.index, x, *args, **kwargs)
