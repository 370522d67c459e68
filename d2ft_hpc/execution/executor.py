"""Attaches a plan to a model: its blocks read which heads to run from the row of the current micro-batch."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import MethodType
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from d2ft_hpc.errors import ConfigError, PlanError
from d2ft_hpc.execution.absent import fill_absent_gradients
from d2ft_hpc.execution.block import BlockHeads, run_block
from d2ft_hpc.execution.block_graphs import BlockGraphs, GradientPlace, Link, Links, Pass
from d2ft_hpc.execution.compilation import allow_kernels_of, cannot_compile, compile_outside_blocks
from d2ft_hpc.execution.copies import leave_out_of_copies
from d2ft_hpc.execution.flat_parameters import FlatParameters
from d2ft_hpc.execution.gradients import (
    Owners,
    Reduction,
    one_point,
    owners_of,
    require_input_gradient,
    zero_gradient,
)
from d2ft_hpc.execution.resize import scaled
from d2ft_hpc.execution.rows import Row, choose_heads
from d2ft_hpc.families.family import BlockFamily, KernelParts
from d2ft_hpc.families.table import backbone_of
from d2ft_hpc.model.subnets import ParameterClass, SubnetMap
from d2ft_hpc.planning.plan import Grid, Operation, SkipPlan

EmbeddingPolicy = Literal["frozen", "complete_path", "trained"]

MOST_SHAPES = 8
"""Kernels that torch.compile keeps for one function, by default, and CUDA graphs that we keep of micro-batches."""


class PlanExecutor:
    """The plan that one model follows in training; evaluation mode is always dense.

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
        self._kernel_parts: dict[int, KernelParts | None] = {}
        self._compiled_shapes: set[Hashable] = set()
        self._largest_input: dict[int, int] = {}  # numbers in what blocks that skip heads got, by tokens
        self.image_size: tuple[int, int] | None = None
        """Height and width of the images that a plan may scale; None: of any."""
        self._is_scaled = False  # the module that embeds the images gets them scaled already
        self._embeds: Callable[[], Any] = lambda: None
        self.block_shapes = 0
        """Kernels of blocks that skip heads and are not fused, under this and earlier plans, if torch.compile makes
        them: one for each different shape of heads, for inputs with and without gradient, for gradients at one point,
        for each rate of DropPath. It makes them for plans with which they are at most 8; blocks of other plans run
        eagerly."""
        self.micro_batch_shapes = 0
        """Different shapes of this replica's micro-batches under the plan in force."""
        self.lookup_seconds = 0.0
        """Seconds that following plans has taken so far on this rank, without the blocks' own work."""
        # Each shape is compiled for itself: kernels for shapes that may vary are slower.
        self._compiled = torch.compile(_dense_forward, dynamic=False) if compile else None
        self._compiled_heads = torch.compile(run_block, dynamic=False) if compile else None
        self._graphs = BlockGraphs() if cuda_graphs else None
        self._recomputes = recomputes
        self._pass: Pass | None = None  # through graphs, while its forward is under way
        self._captures = False

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

        Raises ConfigError where blocks are to be compiled and the engine is ZeRO 3.
        """
        if reduction is Reduction.BY_BLOCK and self._compiled is not None:
            raise ConfigError(
                "compile=True: under ZeRO 3 compiled blocks do not train (DeepSpeed puts a linear layer of its own in "
                "place of torch's, whose weights get no gradient then): compile=False, or use ZeRO 1 or 2"
            )
        if self.trained_beside and reduction is not Reduction.AFTER_BACKWARD:
            raise ConfigError(
                f"{self.trained_beside[0]} takes its gradient from the blocks that run, which differ between replicas "
                f"that reduce {reduction.value}: attach(model, embeddings='frozen'), or model.embeddings=frozen"
            )
        self._slot_source, self._reduction, self._check = slot_source, reduction, check
        self._reduces = reduces
        if self._graphs is not None:
            gathers = reduction is Reduction.BY_BLOCK or isinstance(self.blocks[0], FSDPModule)
            self._graphs = BlockGraphs(gathers, gradient_place)
        if reduction is Reduction.BY_BLOCK:
            require_input_gradient(self.blocks[0])

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
        if plan.grids is not None:
            self._take_any_size(plan)
        if plan.binding == "sample":
            whole = np.isin(rows.reshape(len(rows), -1).sum(1), (0, Operation.FULL * rows[0].size))
            if not whole.all():
                raise PlanError(
                    "the plan binds samples and skips parts of some: only whole samples can be skipped"
                )
        # Where all replicas run a block densely, their gradients come in the same order, and nothing needs to be
        # done.
        all_full = (plan.operations == Operation.FULL).all(axis=2)
        all_dense = all_full.reshape(plan.slots, plan.replicas, -1).all(axis=1)
        self.rows = [
            self._row(cells, ~dense, grid)
            for cells, dense, grid in zip(rows, all_dense, grids, strict=True)
            if plan.binding == "slot"
        ]
        self._owners = {index: self._owners_of(index) for index in self.blocks}
        self._kernel_parts.clear()
        self.block_shapes = self._count_block_shapes(self.rows)
        self.micro_batch_shapes = len({row.shape for row in self.rows})
        allow_kernels_of(len(self.rows))
        self.plan = plan

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
    def makes_graphs(self) -> bool:
        """Whether blocks run as CUDA graphs where they can."""
        return self._graphs is not None

    @property
    def is_dense(self) -> bool:
        """Whether every block runs densely on every micro-batch; it may be one of chosen samples."""
        return self.plan is None or self.plan.binding == "sample" or self.plan.is_dense

    def deactivate(self) -> None:
        """Back to dense training."""
        self.plan, self.rows, self.block_shapes, self.micro_batch_shapes = None, [], 0, 0

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

    @contextmanager
    def temporarily(self, operations: np.ndarray) -> Iterator[None]:
        """Inside, every micro-batch follows `operations`, uint8 [block, head]; afterwards the plan is as before."""
        before = self.plan, self.rows, self.block_shapes, self._slot, self._slot_source
        row = self._row(operations, np.zeros(len(operations), bool))
        self.plan, self.rows, self.block_shapes = None, [row], self._count_block_shapes([row])
        self._slot, self._slot_source = 0, None
        try:
            yield
        finally:
            self.plan, self.rows, self.block_shapes, self._slot, self._slot_source = before

    def run(self, block: nn.Module, index: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Block `index` under the current row; `args` are the block's own."""
        if not self.rows or not block.training or self.subnets.family.generates(kwargs):
            replayed = self._replayed(block, index, None, x, args, kwargs)
            return self._run(block, index, None, x, *args, **kwargs) if replayed is None else replayed
        start = _clock()
        slot = self._slot_of_forward()
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

    def scaled(self, images: Tensor) -> Tensor:
        """A micro-batch's images [sample, channel, height, width] at the resolution that its row asks for. Raises
        PlanError if they are not images of full size.
        """
        if self._is_scaled:
            return images
        return scaled(images, self.scaled_size((images.shape[-2], images.shape[-1])))

    def scaled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that images of this size get. Raises PlanError as `scaled`."""
        grid = self.rows[self._slot_of_forward()].grid if self.rows else None
        if grid is None:
            return size
        if self.image_size not in (None, size):
            raise PlanError(
                f"the model was made for images of {self.image_size[0]} x {self.image_size[1]} pixels and gets "
                f"{size[0]} x {size[1]}, which the plan would scale to that size or less: make the model with "
                f"img_size={size}, or use a planner that leaves images as they are"
            )
        patch_size = self.patch_size
        assert patch_size is not None
        return grid[0] * patch_size[0], grid[1] * patch_size[1]

    @contextmanager
    def scaled_before(self, images: Tensor) -> Iterator[Tensor]:
        """Yields the scaled images. Inside, nothing is scaled or looked up again, so that code compiled there fits
        all micro-batches."""
        images, self._is_scaled = self.scaled(images), True
        try:
            yield images
        finally:
            self._is_scaled = False

    def _slot_of_forward(self) -> int:
        slot = self.slot
        if slot is None:
            raise PlanError(
                "a model with a plan was called in training mode without saying which micro-batch this is: "
                "wrap forward and backward in `with executor.micro_batch(slot):`, or call executor.deactivate()"
            )
        return slot

    def _run(
        self, block: nn.Module, index: int, heads: BlockHeads | None, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Block `index` with these heads; None: all of them."""
        with nullcontext() if self.flat is None else self.flat.placed(index):
            return self._run_placed(block, index, heads, x, *args, **kwargs)

    def _run_placed(
        self, block: nn.Module, index: int, heads: BlockHeads | None, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The same, where the block's modules have their parameters."""
        if heads is None or heads.is_dense:
            return self._run_dense(block, x, *args, **kwargs)
        subnets = self.subnets
        subnets.family.require_skippable(block, kwargs)
        if heads.is_shortcut:
            return x
        if x.is_cuda and self._is_fused(index, heads):
            gathers = self._reduction is Reduction.BY_BLOCK or isinstance(block, FSDPModule)
            result: Tensor = fused().run_fused(
                self._kernel_parts[index], x, heads, self._following(index), not gathers, *args, **kwargs
            )
            return result
        run = run_block if self._compiled_heads is None or not self._compiles(x) else self._compiled_heads

        def forward(x: Tensor) -> Tensor:
            result: Tensor = run(subnets.family, block, x, heads, subnets.head_axes, *args, **kwargs)
            return result

        return subnets.family.run(block, forward, x)

    def _replayed(
        self, block: nn.Module, index: int, slot: int | None, x: Tensor, args: Any, kwargs: Any
    ) -> Tensor | None:
        """Block `index` under the row of `slot`, or densely, through CUDA graphs; None where it has to run without."""
        if self._graphs is None or not block.training or args or kwargs:
            return None  # graphs read a block's input alone
        if self.flat is not None and self.flat.is_unflattened:
            return None  # and the flat parameters
        row = None if slot is None else self.rows[slot]
        chain = self._in_order if row is None else [i for i in row.active if i in self.blocks]
        if index not in chain:
            return None
        if index == chain[0]:
            self._pass = None
            if x.is_cuda and torch.is_grad_enabled() and not (cannot_compile() or self._recomputes()):
                at_one_point = [slot is not None and self._at_one_point(slot, i) for i in chain]
                key = (
                    *(x.shape, x.dtype, x.requires_grad, None if row is None else row.shape, *at_one_point),
                    *(torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
                )
                indices = None if row is None else row.indices
                self._pass = self._graphs.begin(
                    key, x, indices, partial(self._links, chain, row, at_one_point)
                )
        result = None if self._pass is None else self._pass.run(index, x)
        if result is None or index == chain[-1]:
            self._pass = None
        return result

    def _links(self, chain: Sequence[int], row: Row | None, at_one_point: Sequence[bool]) -> Links:
        def compute(index: int, x: Tensor, indices: Tensor | None) -> Tensor:
            heads = None if row is None or indices is None else row.reading(indices).heads[index]
            self._captures = True
            try:
                return self._run(self.blocks[index], index, heads, x)
            finally:
                self._captures = False

        return {
            index: Link(partial(compute, index), self._owners_of(index, frozen_too=True), gives_zeros)
            for index, gives_zeros in zip(chain, at_one_point, strict=True)
        }

    def _owners_of(self, index: int, *, frozen_too: bool = False) -> Owners:
        """As `owners_of`, with the flat parameters where the block's own are parts of them."""
        owners = owners_of(self.blocks[index], frozen_too=frozen_too)
        return owners if self.flat is None else self.flat.owners(index, owners)

    def _compiles(self, x: Tensor) -> bool:
        """Whether blocks that skip heads run through torch.compile on this input.

        Inputs smaller than before, as at the end of an epoch, do not: making their kernels would take longer than
        these save.
        """
        if self.block_shapes > MOST_SHAPES or cannot_compile():
            return False
        largest = self._largest_input[x.shape[1]] = max(self._largest_input.get(x.shape[1], 0), x.numel())
        return x.numel() == largest

    def _is_fused(self, index: int, heads: BlockHeads) -> bool:
        """Whether our own kernels run the block on a GPU."""
        if not heads.trains or heads.is_dense or fused() is None:
            return False
        if index not in self._kernel_parts:
            self._kernel_parts[index] = self.subnets.family.kernel_parts(self.blocks[index])
        return self._kernel_parts[index] is not None

    def _is_compiled(self, index: int, heads: BlockHeads) -> bool:
        """Whether torch.compile may make kernels of the block, which skips heads."""
        if heads.is_dense or heads.is_shortcut:
            return False
        return not (self._device.type == "cuda" and self._is_fused(index, heads))

    def _following(self, index: int) -> KernelParts | None:
        """Kernel parts of the block above block `index`, if its first norm may be computed with that one's last sum."""
        slot, above = self.slot, index + 1
        if slot is None or above not in self.blocks:
            return None
        if self._at_one_point(slot, above) and not self._captures:
            return None  # that block computes with stand-ins
        if self._reduction is Reduction.BY_BLOCK:
            return None  # the engine gathers weights block by block, and has not gathered that one's
        return self._kernel_parts[above] if self._is_fused(above, self.rows[slot].heads[above]) else None

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
        self._in_order = sorted(self.blocks)
        own: dict[str, Any] = {
            "_d2ft": _BlockLink(self, index),
            "forward": MethodType(_planned_forward, block),
        }
        vars(block).update(own)
        leave_out_of_copies(block, own)

    @property
    def embeds(self) -> Any:
        """The model, or the part of one, whose images this executor scales; None without one."""
        return self._embeds()

    @property
    def patch_size(self) -> Grid | None:
        """Height and width of the pixels that become one token; None where this executor scales no images."""
        return None if self.embeds is None else self.subnets.family.patch_size(self.embeds)

    def link_images(self, model: nn.Module) -> None:
        """Lets a model, or the part of one that gets the images, scale them in training as the plan says."""
        embedding = self.subnets.family.embedding(model)
        if embedding is None:
            return
        self._embeds = weakref.ref(model)
        own: dict[str, Any] = {
            "_d2ft": _ImagesLink(self, self._embeds),
            "forward": MethodType(_scaling_forward, embedding),
        }
        if hasattr(type(embedding), "dynamic_feat_size"):  # not peft's wrapper
            own["dynamic_feat_size"] = MethodType(_scaled_grid, embedding)
        vars(embedding).update(own)
        leave_out_of_copies(embedding, own)

    def _take_any_size(self, plan: SkipPlan) -> None:
        """Raises PlanError where the blocks cannot be run on images of other sizes."""
        if not self.subnets.family.takes_images:
            raise PlanError("the plan scales images, and the model reads text: solve a plan by heads")
        if plan.binding == "sample":
            raise PlanError("the plan scales images and draws samples: only one of them can be")
        model = self.embeds
        if model is not None:
            self.subnets.family.take_any_size(model)

    @property
    def _device(self) -> torch.device:
        """The device of the parameters; the CPU while they have no memory."""
        device = next(next(iter(self.blocks.values())).parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    def _run_dense(self, block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._compiled is None or cannot_compile():
            return _dense_forward(block, x, *args, **kwargs)
        result: Tensor = self._compiled(block, x, *args, **kwargs)
        return result

    def _row(self, operations: np.ndarray, sparse: np.ndarray, grid: Grid | None = None) -> Row:
        """operations: uint8 [block, head]; sparse: [block]. grid: patches of the images."""
        is_complete = bool((operations == Operation.FULL).all())
        return Row(*self._choose(operations), is_complete, sparse.tolist(), grid)

    def _choose(self, operations: np.ndarray) -> tuple[Tensor, Sequence[BlockHeads]]:
        return choose_heads(list(operations), self._device)

    def _count_block_shapes(self, rows: Sequence[Row]) -> int:
        """`block_shapes` with these rows added; they count from now on if kernels for them will be made."""
        is_passed_below = (
            self.trains_embeddings
            or self._reduction is Reduction.BY_BLOCK
            or (self.detach_incomplete and self._reduction is not Reduction.AFTER_BACKWARD)
        )
        shapes = set(self._compiled_shapes)
        for slot, row in enumerate(rows):
            for reduces in self._reduction.may_happen_in(slot, len(rows)):
                takes_gradient = is_passed_below
                for index, (heads, is_sparse) in enumerate(zip(row.heads, row.sparse, strict=True)):
                    at_one_point = is_sparse and reduces
                    if index in self.blocks and self._is_compiled(index, heads):
                        rates = self.subnets.family.drops(self.blocks[index]).rates_by_sample
                        shapes.add((row.grid, heads.shape, takes_gradient, at_one_point, rates))
                    takes_gradient |= heads.trains or at_one_point
        if len(shapes) <= MOST_SHAPES:
            self._compiled_shapes = shapes
        return len(shapes)


@cache
def fused() -> Any:
    """The module of fused blocks; None where Triton is not installed."""
    try:
        from d2ft_hpc.execution import fused as module
    except ImportError:
        return None
    return module


def _clock() -> float:
    """Reads the clock; torch.compile traces what is between two readings, but not the readings."""
    return 0.0 if torch.compiler.is_compiling() else time.perf_counter()


def _reduces_in_backward(block: nn.Module) -> bool:
    """Whether torch's DDP, or FSDP2, runs the model."""
    if torch.compiler.is_compiling():
        return False
    return isinstance(block, FSDPModule) or DistributedDataParallel._active_ddp_module is not None


class _BlockLink:
    """What a block keeps: its executor and its place. A plain object, so that the module tree stays as it was."""

    def __init__(self, executor: PlanExecutor, index: int) -> None:
        self.executor, self.index = executor, index


class _ImagesLink:
    """What the module that embeds images keeps: its executor, and the model or part of a model that it belongs to."""

    def __init__(self, executor: PlanExecutor, model: weakref.ref[nn.Module]) -> None:
        self.executor, self._model = executor, model

    @property
    def trains(self) -> bool:
        """Whether the model is in training mode; its embedding may be frozen and left in evaluation mode."""
        model = self._model()
        return model is not None and model.training


def attach(
    model: Any,
    *,
    embeddings: EmbeddingPolicy = "frozen",
    compile: bool = False,
    cuda_graphs: bool = False,
) -> PlanExecutor:
    """Lets a model of one of the families (`d2ft_hpc.families`), or the one inside peft's wrapper or a module of one's
    own, follow skip plans.

    embeddings: what becomes of the parameters below every block, whose gradient is biased by every skip above them:
        "frozen" (default), "complete_path" (trained by the micro-batches that are FULL everywhere) or "trained".
    compile: whether torch.compile makes kernels, one set for each shape: of dense blocks, of those that skip heads
        under plans with few shapes (`PlanExecutor.block_shapes`), and of what lies outside the blocks.
    cuda_graphs: whether, on a GPU, a block's forward and its backward are one launch each, for up to 8 shapes of
        micro-batches; further ones, and a forward that begins while an earlier one waits for its backward, run without.
    The classifier always trains; parameters that are frozen already stay so.

    Raises UnsupportedModelError where the model cannot be cut by head, ConfigError where FSDP2 has it already.
    """
    model = backbone_of(model)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ConfigError(
            "fully_shard was called before attach, which has to see whole weights: call attach first, then fully_shard"
        )
    subnets = SubnetMap.of(model)
    blocks = subnets.blocks(model)
    if any(hasattr(block, "_d2ft") for block in blocks):
        raise PlanError("the model has an executor already: attach once and keep what attach returned")
    executor = PlanExecutor(
        subnets,
        embeddings,
        compile,
        cuda_graphs,
        partial(_recomputes, subnets.family, weakref.ref(model)),
    )
    for name, parameter in model.named_parameters():
        if embeddings == "frozen" and subnets.classify(name) is ParameterClass.EMBEDDING:
            parameter.requires_grad_(False)
            parameter.grad = None  # by which an optimizer that has it would go on
        if parameter.requires_grad and subnets.family.goes_beside(name):
            executor.trained_beside.append(name)
    for index, block in enumerate(blocks):
        executor.link(block, index)
    executor.link_images(model)
    if compile and subnets.family.is_composed:
        compile_outside_blocks(model, subnets.family, executor.scaled_before)
    fill_absent_gradients(model, partial(_skips, subnets))
    return executor


def _recomputes(family: BlockFamily, model: weakref.ref[Any]) -> bool:
    attached = model()
    return attached is not None and family.recomputes(attached)


def _skips(subnets: SubnetMap, model: nn.Module) -> bool:
    """Whether the attached model follows a plan by micro-batches."""
    link: _BlockLink = cast(Any, subnets.blocks(model)[0])._d2ft
    return bool(link.executor.rows)


def _planned_forward(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    link: _BlockLink = cast(Any, block)._d2ft
    return link.executor.run(block, link.index, x, *args, **kwargs)


def _scaling_forward(embedding: nn.Module, *args: Any, **kwargs: Any) -> Any:
    link: _ImagesLink = cast(Any, embedding)._d2ft
    if link.trains and args:
        args = (link.executor.scaled(args[0]), *args[1:])
    elif link.trains:
        kwargs["pixel_values"] = link.executor.scaled(kwargs["pixel_values"])
    return type(embedding).forward(embedding, *args, **kwargs)


def _scaled_grid(embedding: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Patches of images of this size, by which timm arranges blocks' outputs as a map (`forward_intermediates`)."""
    link: _ImagesLink = embedding._d2ft
    size = link.executor.scaled_size(size) if link.trains else size
    grid: tuple[int, int] = type(embedding).dynamic_feat_size(embedding, size)
    return grid


def _dense_forward(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = type(block).forward(block, x, *args, **kwargs)
    return result
