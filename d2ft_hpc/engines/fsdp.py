"""torch's FSDP2 (`fully_shard`): each rank keeps a slice of every parameter, blocks are gathered while they run.

A block that no replica runs in a micro-batch is not called at all: nothing is gathered, nothing reduced. Where any
replica runs it, all gather it, and its gradients are complete on all of them (`execution/gradients.py`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

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
        if len(_group(block).modules if isinstance(block, FSDPModule) else []) > 1:
            raise ConfigError(
                f"fully_shard was called on block {index} together with others: call fully_shard(block) for each"
            )

    executor.bind(slot_source, Reduction.EVERY_MICRO_BATCH, partial(_check, model))
    # A replica that skips a block gives its input back; nothing in these models changes that in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDP\w+\) returned a view")
    gathers = _Gathers(executor)
    for index, block in executor.blocks.items():
        if isinstance(block, FSDPModule):
            _let_pass(block, index, gathers)


def _check(model: nn.Module, plan: SkipPlan) -> None:
    check_recompute(model)
    check_plan(plan, slots=plan.slots, replicas=int(_group(model).mesh_info.mesh.size()))


class _Gathers:
    """Decides which blocks need not be gathered in the micro-batch that runs."""

    def __init__(self, executor: PlanExecutor) -> None:
        self._executor = executor
        self._pending: set[int] = set()  # blocks with gradients that wait for a reduction

    def can_pass(self, block: nn.Module, index: int) -> bool:
        """Whether block `index` can be skipped without gathering it; the answer is the same on all ranks."""
        plan, slot = self._executor.plan, self._executor.slot
        if plan is None or slot is None or plan.binding == "sample" or not block.training:
            return False
        group = _group(block)
        reduces = bool(group.reduce_grads and group.all_reduce_grads)
        rows = plan.operations[slot * plan.replicas : (slot + 1) * plan.replicas, index]
        # By hooks of others than FSDP, such as one that keeps blocks' outputs.
        is_watched = len(block._forward_hooks) > 1
        nobody_runs = bool((rows == Operation.SHORTCUT).all()) and not is_watched
        if nobody_runs and not (reduces and index in self._pending):
            return index > 0 or not self._executor.detach_incomplete
        if reduces:
            self._pending.discard(index)
        elif (rows == Operation.FULL).any():
            self._pending.add(index)
        return False


def _let_pass(block: nn.Module, index: int, gathers: _Gathers) -> None:
    """Gives the block a class, as fully_shard does, whose call leaves out FSDP's hooks where the block can be
    skipped."""
    set_outside_copies(block, {_PASSES: partial(gathers.can_pass, block, index)})
    if not hasattr(type(block), _PASSES):
        block.__class__ = _passing(cast(Any, type(block)))


_PASSES = "_d2ft_passes"
"""A block's attribute: whether it can be skipped now."""


@cache
def _passing(of_block: Any) -> Any:
    """One class for all blocks of a class: torch.compile makes kernels for each class anew."""

    def call(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        passes = getattr(self, _PASSES)
        if passes is not None and passes():
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


def gathers_again(block: nn.Module) -> bool:
    """Whether a block is gathered for the forward and again for the backward."""
    if not isinstance(block, FSDPModule):
        return True
    means = "whether weights stay gathered from the forward to the backward"
    return bool(expect(_group(block), "_reshard_after_forward", means))


KEPT_BYTES = 2**31
"""Weights of up to this size stay gathered from a micro-batch's forward to its backward: gathering them again takes
Python as long as the blocks of small images take to run. A billion parameters in 16 bits; the same on every rank."""


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    param_dtype: torch.dtype | None = None,
    kept_bytes: int = KEPT_BYTES,
) -> int:
    """Spreads a model over a mesh of 1 dimension, or of 2 (replicas x shards): each block by itself, then the rest.

    param_dtype: of the gathered parameters and of activations; gradients are reduced in float32. None: their own.
    kept_bytes: all of a model's weights stay gathered from a forward to its backward if they have no more, gathered.
    Returns the bytes that so lie beside each pass's activations.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32 if param_dtype else None
    )
    gathered = sum(each.numel() * (param_dtype or each.dtype).itemsize for each in model.parameters())
    for block in family_of(model).blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=gathered > kept_bytes)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return gathered if gathered <= kept_bytes else 0


class FsdpEngine(PlainEngine):
    """Trains one replica, or one tensor-parallel rank's heads of it. torch.distributed must be initialised.

    Gradients are reduced in every micro-batch, so that none is ever kept whole.
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
    ) -> None:
        """model: the whole one, which is spread in place. param_dtype, kept_bytes: see `shard`."""
        self._twin = copy.deepcopy(model).to("meta")
        self._placement, layout = placement, placement.layout
        mesh = init_device_mesh(
            next(model.parameters()).device.type,
            (layout.replicas, layout.tensor_ranks),
            mesh_dim_names=("replica", "tensor"),
        )
        if layout.is_cut:
            executor = split_heads(model, executor, mesh["tensor"], placement.owner)
            self._kept_bytes = shard(model, mesh["replica"], param_dtype, kept_bytes)
            optimizer, schedule = make_optimizer(model)
        else:
            optimizer, schedule = make_optimizer(model)  # its groups say which parameters are alike
            executor.flat = FlatParameters(model, executor.blocks, optimizer.param_groups)
            names = {parameter: name for name, parameter in model.named_parameters()}
            self._kept_bytes = shard(model, mesh["replica"], param_dtype, kept_bytes)
            spread = dict(model.named_parameters())
            for group in optimizer.param_groups:
                group["params"] = [spread[names[parameter]] for parameter in group["params"]]
        super().__init__(
            model, executor, optimizer, schedule, loss_function, gradient_clipping=gradient_clipping
        )
        bind_fsdp(model, executor)

    def check(self, plan: SkipPlan) -> None:
        if plan.binding == "sample":
            raise PlanError(
                "planner samples scores images with a second model that shares the first one's weights, which FSDP2 "
                "spreads over ranks: use engine.name=ddp"
            )
        _check(self._model, plan)

    @property
    def bytes_to_come(self) -> float:
        return super().bytes_to_come + self._kept_bytes

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
