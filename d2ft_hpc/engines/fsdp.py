"""torch's FSDP2 (`fully_shard`): each rank keeps a slice of every parameter, blocks are gathered while they run, one by
one or several together.

Blocks gathered together, none of which any replica runs in a micro-batch, are not called at all: nothing is gathered,
nothing reduced. Where any replica runs one, all gather them, and their gradients are complete on all of them
(`execution/gradients.py`).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from d2ft_hpc.engines.check import check_plan, check_recompute
from d2ft_hpc.engines.engine import LossFunction, StateWriter
from d2ft_hpc.engines.gradient_norm import local, total_norm
from d2ft_hpc.engines.model_parallel import PLACEMENT, MakeOptimizer
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.engines.portable import PortableState, restore_schedule, schedule_numbers
from d2ft_hpc.engines.private_names import expect
from d2ft_hpc.engines.sharded import collect, restore, whole_weights
from d2ft_hpc.errors import ConfigError, PlanError
from d2ft_hpc.execution.copies import set_outside_copies
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.flat_parameters import FlatParameters
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.families.table import family_of
from d2ft_hpc.parallel.dtensor import split_heads
from d2ft_hpc.parallel.rank_layout import Placement
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.planning.plan import Operation


def bind_fsdp(model: nn.Module, executor: PlanExecutor, slot_source: Callable[[], int] | None = None) -> None:
    """Fits the executor to a model that `fully_shard` has spread, whose replicas may then follow different rows.
    Gradients are reduced in each micro-batch but those before which `set_requires_gradient_sync(False)` was called.
    Blocks' gradients are complete in those, too: a block is gathered again in the backward, by all ranks or by none.

    slot_source: as `PlanExecutor.bind` takes it.

    Raises ConfigError where plans could not be run exactly.
    """
    if not isinstance(model, FSDPModule):
        raise ConfigError(
            "the model is not spread: call fully_shard(block) for each block, then fully_shard(model)"
        )
    for index, block in executor.blocks.items():
        inner = [name for name, module in block.named_modules() if name and isinstance(module, FSDPModule)]
        if inner:
            raise ConfigError(
                f"fully_shard was called on {inner[0]} inside block {index}: a plan runs a block's heads, not its "
                f"modules, so that nothing would gather it. Call fully_shard(block)"
            )
    indices, blocks = list(executor.blocks), list(executor.blocks.values())
    units = [
        _Unit(executor, {indices[place]: blocks[place] for place in places})
        for places in gathered_together(blocks)
        if isinstance(blocks[places[0]], FSDPModule)
    ]
    for unit in units:
        if len(unit.blocks) < len(unit.group.modules):
            raise ConfigError(
                f"fully_shard was called on block {next(iter(unit.blocks))} together with modules that are no blocks "
                f"of the model: call fully_shard(block) for each block"
            )

    executor.bind(slot_source, Reduction.EVERY_MICRO_BATCH, partial(_check, model))
    # A replica that skips a block gives its input back; nothing in these models changes that in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDP[\w, ]+\) returned a view")
    for unit in units:
        for index, block in unit.blocks.items():
            _let_pass(block, index, unit)


def _check(model: nn.Module, plan: SkipPlan) -> None:
    check_recompute(model)
    check_plan(plan, slots=plan.slots, replicas=int(_group(model).mesh_info.mesh.size()))


class _Unit:
    """Blocks that FSDP2 gathers together. It has to see all of them in a pass, or none."""

    def __init__(self, executor: PlanExecutor, blocks: dict[int, nn.Module]) -> None:
        """blocks: by index."""
        self._executor, self.blocks = executor, blocks
        self.group = _group(next(iter(blocks.values())))
        self._plan: SkipPlan | None = None
        # Of this plan by micro-batch: whether some replica runs any of the blocks, and whether one trains any.
        self._runs: list[bool] = []
        self._trains: list[bool] = []
        self._is_pending = False  # has gradients that wait for a reduction
        self._was_gathered = False

    def can_pass(self, index: int, x: Tensor) -> bool:
        """Whether block `index`, which gets `x`, can be skipped without gathering the unit; the answer is the same on
        all ranks, and for all blocks of a pass."""
        plan, slot, blocks = self._executor.plan, self._executor.slot_of(x), self.blocks.values()
        if plan is None or slot is None or plan.binding == "sample":
            return False
        if not (all(each.training for each in blocks) and torch.is_grad_enabled()):
            return False
        if plan is not self._plan:
            self._read(plan)
        reduces = bool(self.group.reduce_grads and self.group.all_reduce_grads)
        # By hooks of others than FSDP, such as one that keeps blocks' outputs.
        is_watched = any(len(each._forward_hooks) > 1 for each in blocks)
        # A backward that does not reduce asks torch for gathered weights of all units, also of such as never were.
        is_wanted = self._is_pending if reduces else not self._was_gathered
        if not self._runs[slot] and not is_watched and not is_wanted:
            return 0 not in self.blocks or not self._executor.detach_incomplete
        if index == max(self.blocks):  # the others have asked
            self._was_gathered = True
            self._is_pending = not reduces and (self._is_pending or self._trains[slot])
        return False

    def _read(self, plan: SkipPlan) -> None:
        rows = plan.operations[:, list(self.blocks)].reshape(plan.slots, -1)
        self._runs = (rows != Operation.SHORTCUT).any(axis=1).tolist()
        self._trains = (rows == Operation.FULL).any(axis=1).tolist()
        self._plan = plan


def _let_pass(block: nn.Module, index: int, unit: _Unit) -> None:
    """Gives the block a class, as fully_shard does, whose call leaves out FSDP's hooks where the block can be
    skipped."""
    set_outside_copies(block, {_PASSES: partial(unit.can_pass, index)})
    if not hasattr(type(block), _PASSES):
        block.__class__ = _passing(cast(Any, type(block)))


_PASSES = "_d2ft_passes"
"""A block's attribute: whether it can be skipped now."""


@cache
def _passing(of_block: Any) -> Any:
    """One class for all blocks of a class: torch.compile makes kernels for each class anew."""

    def call(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        passes = getattr(self, _PASSES)
        if passes is not None and passes(x):
            return x
        result: Tensor = of_block.__call__(self, x, *args, **kwargs)
        return result

    return type(of_block.__name__, (of_block,), {"__call__": call, _PASSES: None})


def _group(block: Any) -> Any:
    """FSDP2's own record of a block's parameters; no public name says whether it reduces gradients."""
    group = expect(expect(block, "_get_fsdp_state", _RECORD)(), "_fsdp_param_group", _RECORD)
    for name in ("modules", "reduce_grads", "all_reduce_grads", "mesh_info"):
        expect(group, name, _RECORD)
    return group


_RECORD = "which says whether gradients are reduced, and over which ranks"


def gathered_together(blocks: Sequence[nn.Module]) -> list[list[int]]:
    """Places of the blocks that are gathered and reduced together."""
    units: dict[int, list[int]] = {}
    for place, block in enumerate(blocks):
        unit = _group(block) if isinstance(block, FSDPModule) else block
        units.setdefault(id(unit), []).append(place)
    return list(units.values())


class Traffic(NamedTuple):
    """What FSDP2 does for a block in a step of several micro-batches."""

    gathers: int = 2
    """For a micro-batch: once, or again for its backward."""
    gathers_once: bool = False
    """In the first micro-batch that runs the block alone, whose weights stay gathered for the others."""
    reduces_once: bool = False
    """In the last micro-batch alone."""


def traffic_of(block: nn.Module) -> Traffic:
    """As FSDP2's record stands, outside of a last micro-batch."""
    if not isinstance(block, FSDPModule):
        return Traffic()
    group = _group(block)
    again = bool(expect(group, "_reshard_after_forward", _STAYS))
    return Traffic(
        1 + again, not again and not expect(group, "reshard_after_backward", _STAYS), not group.reduce_grads
    )


_STAYS = "whether weights stay gathered from the forward to the backward, and after it"

KEPT_BYTES = 2**31
"""Weights of up to this size stay gathered from a step's first micro-batch to its last backward, and their gradients
are whole until then: gathering and reducing again takes Python as long as the blocks of small images take to run. A
billion parameters in 16 bits; the same on every rank."""


class Spread(NamedTuple):
    """What lies on a rank in a step beside its slices, its tensor-parallel share alone."""

    stays: bool
    """Whether all weights stay gathered from a forward to its backward."""
    weight_bytes: float
    """Of gathered weights: of all, or of as many blocks as there are at once."""
    gradient_bytes: float
    """Of gradients that are not reduced yet: of all, in steps of several micro-batches, or of a block."""


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    param_dtype: torch.dtype | None = None,
    kept_bytes: int = KEPT_BYTES,
) -> Spread:
    """Spreads a model over a mesh of 1 dimension, or of 2 (replicas x shards): its blocks, then the rest.

    param_dtype: of the gathered parameters and of activations; gradients are reduced in float32. None: their own.
    kept_bytes: all of a model's weights stay gathered from a forward to its backward if they have no more, gathered.
    Then several blocks are gathered and reduced together, unless they are recomputed; else each by itself.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32 if param_dtype else None
    )
    keeps = (
        sum(each.numel() * (param_dtype or each.dtype).itemsize for each in model.parameters()) <= kept_bytes
    )
    family = family_of(model)
    blocks = list(family.blocks(model))
    spread = _what_lies_beside(model, blocks, param_dtype, keeps)
    # FSDP2's hooks take Python's time for each unit, and beside what the first unit sends nothing computes: as many
    # units as blocks in each. Where only some of a unit's blocks are recomputed, torch below 2.13 warns.
    size = math.isqrt(len(blocks)) if keeps and not family.recomputes(model) else 1
    for begin in range(0, len(blocks), size):
        unit = blocks[begin : begin + size]
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=not keeps)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return spread


def _what_lies_beside(
    model: nn.Module, blocks: Sequence[nn.Module], param_dtype: torch.dtype | None, stays: bool
) -> Spread:
    """Before the model is spread."""

    def weights(module: nn.Module) -> int:
        return sum(local(each).numel() * (param_dtype or each.dtype).itemsize for each in module.parameters())

    def gradients(module: nn.Module) -> int:  # as they are reduced
        return sum(4 * local(each).numel() for each in module.parameters() if each.requires_grad)

    if stays:
        return Spread(True, weights(model), gradients(model))
    # In the backward: the block that runs, the next one, and the message that brings it; a block's gradients, and the
    # message that reduces those of the one before. What is in no block stays gathered.
    outside = weights(model) - sum(map(weights, blocks))
    return Spread(False, outside + 3 * max(map(weights, blocks)), 2 * max(map(gradients, blocks)))


class FsdpEngine(PlainEngine):
    """Trains one replica, or one tensor-parallel rank's heads of it. torch.distributed must be initialised.

    Where weights stay gathered, they are gathered once in a step, and gradients are reduced in its last micro-batch.
    Else gradients are reduced in every micro-batch, so that none is ever kept whole.
    """

    def __init__(
        self,
        model: nn.Module,
        executor: PlanExecutor,
        placement: Placement,
        make_optimizer: MakeOptimizer,
        loss_function: LossFunction,
        *,
        param_dtype: torch.dtype | None = None,
        gradient_clipping: float | None = None,
        kept_bytes: int = KEPT_BYTES,
        slots: int = 1,
    ) -> None:
        """model: the whole one, which is spread in place. param_dtype, kept_bytes: see `shard`. slots: micro-batches of
        a step, for `bytes_to_come`."""
        self._twin = copy.deepcopy(model).to("meta")
        # No state has some of them, such as rotary positions.
        self._buffers = [buffer.detach().clone() for buffer in model.buffers()]
        self._placement, layout = placement, placement.layout
        mesh = init_device_mesh(
            next(model.parameters()).device.type,
            (layout.replicas, layout.tensor_ranks),
            mesh_dim_names=("replica", "tensor"),
        )
        if layout.is_cut:
            executor = split_heads(model, executor, mesh["tensor"], placement.owner)
            self._spread = shard(model, mesh["replica"], param_dtype, kept_bytes)
            optimizer, schedule = make_optimizer(model)
        else:
            optimizer, schedule = make_optimizer(model)  # its groups say which parameters are alike
            executor.flat = FlatParameters(model, executor.blocks, optimizer.param_groups)
            names = {parameter: name for name, parameter in model.named_parameters()}
            self._spread = shard(model, mesh["replica"], param_dtype, kept_bytes)
            sliced = dict(model.named_parameters())
            for group in optimizer.param_groups:
                group["params"] = [sliced[names[parameter]] for parameter in group["params"]]
        super().__init__(
            model, executor, optimizer, schedule, loss_function, gradient_clipping=gradient_clipping
        )
        bind_fsdp(model, executor)
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._slots = slots
        if self._spread.stays:
            self._set_last(False)

    def _set_last(self, is_last: bool) -> None:
        """In the last micro-batch alone the backward reduces the gradients and lets go of the weights."""
        for module in self._units:
            module.set_requires_gradient_sync(is_last, recurse=False)
            module.set_reshard_after_backward(is_last, recurse=False)

    @contextmanager
    def _micro_batch(self, slot: int, slots: int) -> Iterator[None]:
        is_last = self._spread.stays and slot == slots - 1
        if is_last:
            self._set_last(True)
        with super()._micro_batch(slot, slots):
            yield
        if is_last:
            self._set_last(False)
            for module in self._units:  # those that the last micro-batch did not run
                module.reshard()

    def check(self, plan: SkipPlan) -> None:
        if plan.binding == "sample":
            raise PlanError(
                "planner samples scores images with a second model that shares the first one's weights, which FSDP2 "
                "spreads over ranks: use engine.name=ddp"
            )
        _check(self._model, plan)

    @property
    def bytes_to_come(self) -> float:
        waits = self._slots > 1 or not self._spread.stays
        return super().bytes_to_come + self._spread.weight_bytes + waits * self._spread.gradient_bytes

    def _clip(self) -> Tensor:
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        norm = total_norm(gradients)
        if self._max_norm is not None:
            factor = torch.clamp(self._max_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
        return norm

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        device = next(self._model.parameters()).device
        full = copy.deepcopy(self._twin).to_empty(device=device)
        for buffer, own in zip(full.buffers(), self._buffers, strict=True):
            buffer.copy_(own)
        weights = whole_weights(self._model, self.executor)
        flat = self.executor.flat
        full.load_state_dict(weights if flat is None else flat.split(weights), strict=True)
        yield full.train(self._model.training)

    def save(self, folder: Path, write: StateWriter) -> None:
        state = collect(self._model, self._optimizer, self.executor)
        if dist.get_rank() == 0:
            state.schedule = schedule_numbers(self._schedule)
            state.with_parts(self.executor.flat).write(folder, write)
            if self._placement.layout.is_cut:
                self._placement.write(folder / PLACEMENT)

    def restore(self, folder: Path) -> None:
        state = PortableState.read(folder).with_flats(self.executor.flat)
        restore(state, self._model, self._optimizer, self.executor)
        restore_schedule(self._schedule, state.schedule)
