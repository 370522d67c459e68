"""The compute that a plan promises, from counted passes of the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from d2ft_hpc.errors import PlanError, UnsupportedModelError
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.metering.meter import meter
from d2ft_hpc.model.probe import probe
from d2ft_hpc.planning.arrays import Flags, Floats, Ints
from d2ft_hpc.planning.plan import Grid, Operation, SkipPlan
from d2ft_hpc.planning.token_curve import TokenCurve, token_curve
from d2ft_hpc.planning.tokens import grids_of


@dataclass(frozen=True)
class RankWork:
    """What a step's plan asks of a rank. A row is a micro-batch, or a sample if the plan binds samples; it counts as
    FULL if any of its subnets is."""

    planned_flops: float
    full_rows: int
    forward_only_rows: int
    left_out_rows: int


@dataclass(frozen=True, eq=False)
class StepCosts:
    """FLOPs of one sample, in training.

    outside_flops: of what lies outside the blocks. full_by_block, forward_only_by_block: of one subnet of each block,
        float64 [block]. A block with frozen parameters has fewer in backward: no weight gradients, and none at all if
        nothing below it trains.
    subnets: number of them in each block, int64 [block].
    trains: bool [block]. A block whose parameters are all frozen does not train; plans do not decide about it: it
    runs FULL, which counts as always run. trains_embeddings: every micro-batch's gradient goes on below the blocks.
    score_flops: of scoring the sample; 0 where samples are not scored one by one. share_by_square: of a text, the share
    of the dense FLOPs that grows with the square of its tokens (attention); the rest grows with their number. at: the
    same for images of the other sizes that a run's plans have, by their patches, down and across.
    """

    outside_flops: float
    full_by_block: Floats
    forward_only_by_block: Floats
    subnets: Ints
    trains: Flags
    trains_embeddings: bool = False
    score_flops: float = 0.0
    share_by_square: float = 0.0
    at: Mapping[Grid, StepCosts] = field(default_factory=dict)

    @property
    def num_subnets(self) -> int:
        """Subnets in the blocks that train."""
        return int(self.subnets[self.trains].sum())

    @property
    def always_flops(self) -> float:
        """FLOPs of what runs whatever the plan says."""
        frozen = ~self.trains
        return self.outside_flops + float(self.full_by_block[frozen] @ self.subnets[frozen])

    @property
    def full_flops(self) -> float:
        """FLOPs of a subnet under FULL, on average over the blocks that train."""
        return self._mean(self.full_by_block)

    @property
    def forward_only_flops(self) -> float:
        """FLOPs of a subnet under FORWARD_ONLY, on average over the blocks that train."""
        return self._mean(self.forward_only_by_block)

    def _mean(self, by_block: Floats) -> float:
        return float(by_block[self.trains] @ self.subnets[self.trains]) / max(self.num_subnets, 1)

    @property
    def forward_share(self) -> float:
        """Cost of FORWARD_ONLY in units of FULL (c_f of the paper)."""
        return self.forward_only_flops / self.full_flops if self.num_subnets else 1.0

    @property
    def block_flops(self) -> Floats:
        """Training FLOPs of each block in the dense model, float64 [block]."""
        return np.asarray(self.full_by_block * self.subnets)

    @property
    def dense_flops(self) -> float:
        """Training FLOPs of one sample in the dense model, in which the same parameters are frozen."""
        return self.outside_flops + float(self.block_flops.sum())

    @property
    def always_share(self) -> float:
        """Share of the dense FLOPs that runs whatever the plan says."""
        return self.always_flops / self.dense_flops

    def relative(self, tokens: float) -> float:
        """The dense FLOPs of a sample of so many tokens, both in units of the one that was counted."""
        return (1 - self.share_by_square) * tokens + self.share_by_square * tokens**2

    def planned_flops(self, rows: np.ndarray, grids: np.ndarray | None = None) -> Floats:
        """Training FLOPs of one sample under each row; rows: uint8 [row, block, head], returns float64 [row].

        grids: patches of the rows' images, [row, 2], whose costs are in `at`; None: images have full size.
        """
        if grids is not None:
            of_rows = np.empty(len(rows))
            for down, across in np.unique(grids, axis=0).tolist():
                chosen = (grids == (down, across)).all(axis=1)
                of_rows[chosen] = self._at((down, across)).planned_flops(rows[chosen])
            return of_rows
        full = (rows == Operation.FULL).sum(axis=2)
        forward_only = (rows == Operation.FORWARD_ONLY).sum(axis=2)
        # A frozen block has a backward only where something below it takes a gradient.
        takes = (full > 0) & self.trains
        is_passed = self.trains | self.trains_embeddings | (np.cumsum(takes, axis=1) > takes)
        of_full = np.where(is_passed, self.full_by_block, self.forward_only_by_block)
        flops = (full * of_full).sum(axis=1) + forward_only @ self.forward_only_by_block
        return np.asarray(self.outside_flops + flops)

    def planned_share(self, plan: SkipPlan) -> float:
        """The plan's training FLOPs over the dense ones, always-run parts and scoring included."""
        if plan.binding == "sample":
            return plan.shares()[Operation.FULL] + self.score_flops / self.dense_flops
        return float(self.planned_flops(plan.operations, plan.grids).mean() / self.dense_flops)

    def of_replica(self, plan: SkipPlan, replica: int) -> Floats:
        """Training FLOPs of one sample in each of a replica's rows, float64 [slot]."""
        return self.planned_flops(plan.for_replica(replica), plan.grids_of(replica))

    def work(
        self,
        plan: SkipPlan,
        replica: int,
        own: Flags,
        slots: Sequence[int],
        samples: Sequence[float],
    ) -> RankWork:
        """What a plan that binds slots asks of a rank in these micro-batches of its replica. samples: of each
        micro-batch, in samples of the size that was counted.

        own: bool [block, head], the rank's subnets.
        """
        operations = np.where(own, plan.for_replica(replica)[slots], Operation.SHORTCUT)
        grids = plan.grids_of(replica)
        flops = self.planned_flops(operations, None if grids is None else grids[slots])
        most = operations.reshape(len(operations), -1).max(1, initial=0)
        full, forward_only, left_out = (
            int((most == operation).sum()) for operation in sorted(Operation, reverse=True)
        )
        return RankWork(float(flops @ samples), full, forward_only, left_out)

    def check(self, plan: SkipPlan) -> None:
        """Raises PlanError where the plan has images of sizes that are not in `at`."""
        if plan.grids is not None:
            for down, across in np.unique(plan.grids, axis=0).tolist():
                self._at((down, across))

    def _at(self, grid: Grid) -> StepCosts:
        if grid not in self.at:
            raise PlanError(
                f"the plan has images of {grid[0]} x {grid[1]} patches, whose costs were not counted; this run has "
                f"{', '.join(f'{down} x {across}' for down, across in self.at) or 'those of full size'}: images of "
                f"other sizes need planner tokens, or token_budget, and their sides"
            )
        return self.at[grid]


def measure_costs(
    model: nn.Module,
    executor: PlanExecutor,
    sample_shape: tuple[int, ...],
    sides: Sequence[float] | None = None,
    *,
    whole: nn.Module | None = None,
) -> StepCosts:
    """Counts a training pass of one blank sample through the dense model, and through each block by itself.

    sample_shape: (channel, height, width) of images of full size, or (token,). sides: of smaller images that plans may
    have, in units of the full ones, which are counted, too; None: there are none. whole: the user's own model around
    `model`; a head of it that the family knows is counted, too. Model, gradients, random state and the plan in force
    stay as they were.

    Raises UnsupportedModelError where there are sides and the model takes one size only, or whole patches do not make
    up an image.
    """
    family = executor.subnets.family
    around = model if whole is None else family.around(model, whole)
    costs = _costs_of_size(model, around, executor, sample_shape)
    if len(sample_shape) == 1:
        costs = replace(costs, share_by_square=_share_by_square(costs, around, executor, sample_shape[0]))
    if sides is None:
        return costs
    channels, height, width = sample_shape
    high, wide = family.patch_size(model)
    full = height // high, width // wide
    if (height % high, width % wide) != (0, 0):
        near = (max(round(height / high), 1) * high, max(round(width / wide), 1) * wide)
        raise UnsupportedModelError(
            f"images of {height} x {width} pixels cannot be divided into patches of {high} x {wide}, as scaled images "
            f"are: make the model for {near[0]} x {near[1]} (img_size, data.image_size), or use a "
            f"planner that leaves images as they are"
        )
    at = {}
    with family.taking_any_size(model):
        for grid in grids_of(full, sides):
            shape = channels, grid[0] * high, grid[1] * wide
            try:
                at[grid] = costs if grid == full else _costs_of_size(model, around, executor, shape)
            except (RuntimeError, AssertionError) as error:  # of a forward that is none of the library's
                raise UnsupportedModelError(
                    f"{type(model).__name__} takes images of {height} x {width} pixels, but fails on {shape[1]} x "
                    f"{shape[2]} ({str(error).partition(chr(10))[0]}): let its forward take any size, as timm's "
                    f"dynamic_img_size does, or use a planner that leaves images as they are, such as joint"
                ) from error
    return replace(costs, at=at)


def _costs_of_size(
    model: nn.Module, around: nn.Module, executor: PlanExecutor, sample_shape: tuple[int, ...]
) -> StepCosts:
    """around: the model, or a module that has it inside and takes the same input."""
    blocks, heads = executor.subnets.blocks(model), executor.subnets.num_heads
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handles = [
        block.register_forward_pre_hook(lambda _, *given: inputs.append(given), with_kwargs=True)
        for block in blocks
    ]
    family = executor.subnets.family
    sample = family.blank(model, sample_shape)
    with _counting(around):
        try:
            dense = _count_flops(around, executor, Operation.FULL, sample)
        finally:
            for handle in handles:
                handle.remove()
        passes = {
            operation: np.array(
                [
                    _count_flops(block, executor, operation, *args, **family.afresh(kwargs))
                    for block, (args, kwargs) in zip(blocks, inputs, strict=True)
                ],
                dtype=np.float64,
            )
            for operation in (Operation.FULL, Operation.FORWARD_ONLY)
        }
    return StepCosts(
        outside_flops=float(dense - passes[Operation.FULL].sum()),
        full_by_block=passes[Operation.FULL] / heads,
        forward_only_by_block=passes[Operation.FORWARD_ONLY] / heads,
        subnets=np.full(len(blocks), heads, dtype=np.int64),
        trains=executor.trains,
        trains_embeddings=executor.trains_embeddings,
    )


@contextmanager
def _counting(module: nn.Module) -> Iterator[None]:
    """Inside, passes of the module compute as training would, and leave it as it was."""
    is_meta = next(module.parameters()).is_meta
    with probe(module, training=True), _FusedAttention() if is_meta else nullcontext():
        yield


def _share_by_square(costs: StepCosts, around: nn.Module, executor: PlanExecutor, tokens: int) -> float:
    """`StepCosts.share_by_square` of a text of so many tokens, from another pass of half of them."""
    if tokens == 1:
        return 0.0
    half = tokens // 2
    with _counting(around):
        sample = executor.subnets.family.blank(around, (half,))
        share = _count_flops(around, executor, Operation.FULL, sample) / costs.dense_flops
    by_number, by_square = half / tokens, (half / tokens) ** 2
    return (by_number - share) / (by_number - by_square)


class _FusedAttention(TorchFunctionMode):
    """Makes attention use a fused kernel on the meta device too. Torch would use matrix products there, whose
    backward computes less than that of the kernel that will train the model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        kwargs = {key: kwargs[key] for key in ("attn_mask", "scale") if key in kwargs}
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], **kwargs)[0]


def _count_flops(
    module: nn.Module, executor: PlanExecutor, operation: Operation, x: Tensor, *args: Any, **kwargs: Any
) -> int:
    """FLOPs of a training pass of `x`. It includes the gradient of `x` where the pass would compute one."""
    operations = np.full(executor.subnets.shape, operation, dtype=np.uint8)
    x = x.detach().requires_grad_(x.requires_grad)
    wanted = [each for each in (x, *module.parameters()) if each.requires_grad]
    with executor.temporarily(operations), meter() as metered:
        output = module(x, *args, **kwargs)
        sums = [each.sum() for each in _tensors(output) if each.requires_grad]
        if sums:
            torch.autograd.grad(sums, wanted, allow_unused=True)
    return metered.flops


def _tensors(output: Any) -> Iterable[Tensor]:
    """The tensors in what a model returns: one, or several by name."""
    parts = output.values() if isinstance(output, Mapping) else [output]
    return [each for each in parts if isinstance(each, Tensor)]


def token_curve_of(costs: StepCosts, budget: float, samples: Sequence[int]) -> TokenCurve:
    """The curve over the grids of `costs.at`. Raises PlanError as `token_curve`."""
    relative = [of_grid.dense_flops / costs.dense_flops for of_grid in costs.at.values()]
    return token_curve(list(costs.at), relative, budget, samples)
