"""How many bytes a rank sends in a step under a plan, by the same model that planners use
(`planning.communication_volume`)."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import numpy as np
from torch import nn

from d2ft_hpc.engines.fsdp import gathered_together, traffic_of
from d2ft_hpc.engines.replicas import trained_blocks
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.model.subnets import ParameterClass
from d2ft_hpc.parallel.rank_layout import Placement
from d2ft_hpc.parallel.tensor import TensorParallelExecutor
from d2ft_hpc.planning import Operation, SkipPlan
from d2ft_hpc.planning.communication_volume import (
    DataParallel,
    Replicas,
    TokenLayout,
    active_and_full_ranks,
    fsdp2_bytes,
    pipeline_bytes,
    reduces_trained_blocks_only,
    ring_bytes,
    tensor_parallel_bytes,
)


class Batches(Protocol):
    """The batches of a training, as a `PlanContext` tells of them: which rank holds which subnet, the micro-batches of
    a replica's batch, and the samples of one."""

    @property
    def placement(self) -> Placement: ...
    @property
    def slots(self) -> int: ...
    @property
    def micro_batch_size(self) -> int: ...


class PlannedBytes:
    """Bytes that this rank sends under a plan, for full batches.

    Small messages that no plan changes (losses, norms, shapes) are not counted."""

    def __init__(
        self,
        model: nn.Module,
        executor: PlanExecutor,
        batches: Batches,
        *,
        precision: str,
        data_parallel: DataParallel,
        around: nn.Module | None = None,
    ) -> None:
        """model: the whole one, as the engine left it. executor: the engine's. around: the user's own model around
        it, whose other parameters are reduced, too. precision: "fp32", "bf16", "fp16"."""
        placement, layout = batches.placement, batches.placement.layout
        self._placement, self._slots, self._data_parallel = placement, batches.slots, data_parallel
        if data_parallel == "zero0" and precision == "bf16" and layout.stages > 1:
            # In pipelines, DeepSpeed's optimiser for bf16 spreads its state over the replicas without being asked.
            self._data_parallel = "zero1"
        self._executor, subnets = executor, executor.subnets
        self._blocks, self._heads = subnets.num_blocks, subnets.num_heads
        self._newest: tuple[SkipPlan | None, dict[str, float]] | None = None
        whole, half = (4, 4) if precision == "fp32" else (4, 2)
        family = subnets.family
        if layout.is_cut:
            self._activation_bytes = batches.micro_batch_size * family.numbers_between(model) * half
            self._patch_size = family.patch_size(model)
            full = family.image_shape(model)
            assert full is not None  # or there would be no numbers between the blocks
            self._tokens = partial(family.tokens, model)
            self._full_tokens = self._tokens(*full[1:])
        self._traffic = traffic_of(subnets.blocks(model)[0])
        self._units = gathered_together(subnets.blocks(model))
        self._leaves_out = reduces_trained_blocks_only(data_parallel, precision)
        # Bytes of this rank by block; the last entry is for what is in no block.
        self._parameters = np.zeros(self._blocks + 1)
        self._kept = 0.0  # of the parameters that ZeRO 3 keeps whole
        self._trained = np.zeros(self._blocks + 1)
        self._shared = np.zeros(self._blocks)  # trained ones that no head owns
        self._by_head = np.zeros(self._blocks)  # those of them that each head uses by itself
        own_heads = placement.own.sum(axis=1)
        names = {parameter: name for name, parameter in model.named_parameters()}
        for parameter in names if around is None else around.parameters():
            name = names.get(parameter)
            kind = ParameterClass.CLASSIFIER if name is None else subnets.classify(name)
            size = float(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO 3 leaves an empty tensor
            block = self._blocks
            place = None if name is None else subnets.place_of(name)
            if place is not None:
                block, inner = place
                if block not in placement.blocks:
                    continue
                if kind is ParameterClass.SUBNET:
                    size *= own_heads[block] / subnets.num_heads
                elif parameter.requires_grad:
                    self._shared[block] += half * size
                    self._by_head[block] += half * size * subnets.family.used_by_head(inner)
            elif layout.stage != (0 if kind is ParameterClass.EMBEDDING else layout.stages - 1):
                continue
            if data_parallel == "fsdp2":  # each rank gets as many rows
                rows = len(parameter) if parameter.dim() else 1
                size *= -(-rows // layout.replicas) * layout.replicas / rows
            self._parameters[block] += half * size
            self._kept += half * size * getattr(parameter, "ds_persist", False)
            reduced = whole if data_parallel in ("ddp", "fsdp2") else half
            self._trained[block] += reduced * size * parameter.requires_grad

    def of(self, plan: SkipPlan, token_layout: TokenLayout) -> float:
        """Bytes that this rank sends in a step; of tensor-parallel messages, the mean over its group."""
        has_parts = self._placement.layout.is_cut and plan.binding != "sample"
        return self._of_replicas(plan) + (self._of_parts(plan, token_layout) if has_parts else 0.0)

    def columns(self) -> dict[str, float]:
        """`planned_bytes` and `dense_bytes` of a step under the plan in force, or under none: dense."""
        executor = self._executor
        if self._newest is None or self._newest[0] is not executor.plan:
            replicas = self._placement.layout.replicas
            dense = SkipPlan.dense(self._slots, replicas, self._blocks, self._heads)
            layout = executor.token_layout if isinstance(executor, TensorParallelExecutor) else "replicated"
            planned = self.of(executor.plan or dense, layout)
            self._newest = executor.plan, {"planned_bytes": planned, "dense_bytes": self.of(dense, layout)}
        return self._newest[1]

    def _of_replicas(self, plan: SkipPlan) -> float:
        layout = self._placement.layout
        if layout.replicas == 1:
            return 0.0
        if self._data_parallel == "fsdp2":
            operations = plan.operations.copy()
            if self._executor.detach_incomplete:  # block 0 always runs, because of the embeddings
                operations[:, 0] = np.maximum(operations[:, 0], Operation.FORWARD_ONLY)
            for unit in self._units:  # is gathered where any of its blocks runs
                operations[:, unit] = operations[:, unit].max(axis=(1, 2), keepdims=True)
            sent = fsdp2_bytes(operations, layout.replicas, self._parameters, self._trained, *self._traffic)
            return sum(sent.values())
        reduced = np.ones(self._blocks + 1, dtype=bool)
        if self._leaves_out:
            reduced[:-1] = trained_blocks(plan, self._blocks)
        replicas = Replicas(
            self._data_parallel,
            layout.replicas,
            self._slots,
            gradient_bytes=float(self._trained[reduced].sum()),
            parameter_bytes=float(self._parameters.sum()),
            updated_bytes=float(self._trained.sum()),
            kept_bytes=self._kept,
        )
        return sum(replicas.bytes_of_step().values())

    def _of_parts(self, plan: SkipPlan, token_layout: TokenLayout) -> float:
        placement, layout = self._placement, self._placement.layout
        operations, ranks = plan.for_replica(layout.replica), layout.tensor_ranks
        tokens = np.array([self._token_share(plan, slot) for slot in range(plan.slots)])
        total = 0.0
        for share in np.unique(tokens):
            total += self._of_tokens(
                operations[tokens == share], share * self._activation_bytes, token_layout
            )
        if ranks == 1:
            return total
        # Where each rank has a part of a gradient, the parts are summed once a step.
        blocks = list(placement.blocks)
        is_sharded = token_layout != "replicated"
        active, full = active_and_full_ranks(operations[:, blocks], placement.owner[blocks], ranks)
        alone = ((active == 1) & (full == 1)).any(axis=0)
        shared = np.where(alone | is_sharded, self._shared[blocks], self._by_head[blocks])
        return total + ring_bytes("allreduce", float(shared[full.any(axis=0)].sum()), ranks)

    def _token_share(self, plan: SkipPlan, slot: int) -> float:
        """Tokens of a micro-batch's images in units of full-size images."""
        grid = plan.grid_of(slot * plan.replicas + self._placement.layout.replica)
        if grid is None:
            return 1.0
        (down, across), (high, wide) = grid, self._patch_size
        return self._tokens(down * high, across * wide) / self._full_tokens

    def _of_tokens(self, operations: np.ndarray, whole: float, token_layout: TokenLayout) -> float:
        """Bytes sent for the tokens of micro-batches, each of `whole` bytes. operations: uint8 [slot, block, head]."""
        placement, layout = self._placement, self._placement.layout
        ranks = layout.tensor_ranks
        is_sharded = token_layout != "replicated" and ranks > 1
        own = whole / (ranks if is_sharded else 1)
        is_first, is_last = layout.stage == 0, layout.stage == layout.stages - 1
        blocks = list(placement.blocks)
        total = 0.0
        if not is_last:
            total += pipeline_bytes(len(operations), own, 0)
        if not is_first:
            below = (operations[:, placement.stage < layout.stage] == Operation.FULL).any(axis=(1, 2))
            total += pipeline_bytes(
                0, own, len(operations) if self._executor.trains_embeddings else int(below.sum())
            )
        if ranks == 1:
            return total
        sums = tensor_parallel_bytes(
            operations[:, blocks], placement.owner[blocks], ranks, whole, token_layout
        )
        total += float(sums.forward.sum() + sums.backward.sum())
        joins = is_last + (is_first and self._executor.trains_embeddings)
        return float(total + is_sharded * joins * len(operations) * (ranks - 1) * own)
