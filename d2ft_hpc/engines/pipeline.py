"""DeepSpeed's pipeline engine, ZeRO stages 0 and 1, with or without tensor parallelism in its stages.

Each rank holds one stage: a `ModelPart`. Hooks around the stage's forward tell its blocks which micro-batch this is,
in the order of the schedule (1F1B), which is that of the slots on every stage.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, distributed, nn

from d2ft_hpc.engines.check import check_plan
from d2ft_hpc.engines.deepspeed_private import (
    average_over_micro_batches,
    cast_buffers,
    exchange_both_ways,
    import_deepspeed,
    loss_of_replica,
    topology_of,
    zero_missing_master_gradients,
)
from d2ft_hpc.engines.engine import LossFunction, MicroBatch, StepReport, zero_missing_gradients
from d2ft_hpc.engines.model_parallel import CutEngine, CutModel, share_part
from d2ft_hpc.engines.replicas import reduce_trained_blocks
from d2ft_hpc.engines.state_bytes import bytes_to_come
from d2ft_hpc.metering.phases import phase
from d2ft_hpc.model.probe import evaluating
from d2ft_hpc.parallel.model_part import ModelPart
from d2ft_hpc.planning import Operation, SkipPlan


class PipelineEngine(CutEngine):
    """Trains one stage of one replica. torch.distributed must be initialised."""

    same_rows: str | None = None

    def __init__(self, cut: CutModel, loss_function: LossFunction, config: Mapping[str, Any]) -> None:
        """config: DeepSpeed's."""
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(auto_mpi_discovery=False)
        from deepspeed.pipe import LayerSpec, PipelineModule

        layers = [LayerSpec(ModelPart, cut.whole, blocks, cut.executor) for blocks in cut.placement.stages]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its partition, one layer for each stage
            self._module = PipelineModule(
                layers,
                topology=topology_of(cut.placement.layout),
                loss_fn=loss_function,
                partition_method="uniform",
                dynamic_shape=True,  # the micro-batches of an epoch's last batch differ in size
            )
        (self.part,) = (child for child in self._module.children() if isinstance(child, ModelPart))
        grid = self._module.mpu()
        self.executor = share_part(self.part, cut, grid.get_slice_parallel_group())
        self._replica_group = grid.get_model_parallel_group()
        self._cut, self._placement = cut, cut.placement
        optimizer, schedule = cut.make_optimizer(self.part)
        self._trained = [parameter for parameter in self.part.parameters() if parameter.requires_grad]
        self.made = deepspeed.initialize(
            model=self._module,
            optimizer=optimizer,
            lr_scheduler=schedule,
            config={**config, "pipeline": {**_WHOLE_MESSAGES, **config.get("pipeline", {})}},
            **{"model_parameters": self._trained, **cut.options_for(self.part)},
        )
        """What `deepspeed.initialize` returned: the engine, and what belongs to it."""
        self.engine = self.made[0]
        cast_buffers(self.executor, next(self.part.parameters()).dtype)
        average_over_micro_batches(self.engine)
        exchange_both_ways(self.engine, self._gradient_is_needed)
        reduce_trained_blocks(self.engine, self.part, self.executor)
        self._slot = 0
        self._row: ExitStack | None = None
        self._module.register_forward_pre_hook(self._before_forward)
        self._module.register_forward_hook(self._after_forward)

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepReport:
        """Everything except the stage's forward and communication counts as backward, also the optimiser."""
        report = StepReport(learning_rate=self.engine.get_lr()[0])
        dtype = next(self.part.parameters()).dtype
        self.begin_batch()
        with phase("backward"):
            self.engine.train_batch(iter([(images.to(dtype), labels) for images, labels in micro_batches]))
        norm = self.engine.get_global_grad_norm()
        report.gradient_norm = float("nan") if norm is None else float(norm)
        report.loss = loss_of_replica(self.engine)
        return report

    def begin_batch(self) -> None:
        """Before DeepSpeed's `train_batch`, whose first micro-batch is the first of the plan."""
        self._slot = 0
        if not self.executor.is_dense:
            # Before the first backward, because the engine reduces gradients as soon as the last one is done.
            zero_missing_gradients(self._trained)
            zero_missing_master_gradients(self.engine)

    @property
    def bytes_to_come(self) -> float:
        return bytes_to_come(self._trained, self.engine.basic_optimizer)

    def check(self, plan: SkipPlan) -> None:
        slots, replicas = self.engine.gradient_accumulation_steps(), self._placement.layout.replicas
        check_plan(plan, slots=slots, replicas=replicas)

    def logits(self, images: Sequence[Tensor]) -> list[Tensor]:
        family = self.executor.subnets.family
        layout, part = self._placement.layout, family.of_any_size(self.part)
        dtype = next(self.part.parameters()).dtype
        below, above = (
            layout.rank_of(stage=layout.stage + step, replica=layout.replica, tensor_rank=layout.tensor_rank)
            for step in (-1, 1)
        )
        outputs, sending = [], []
        with evaluating(self.part):
            for of_slot in images:
                x = of_slot.to(dtype)
                if not self.part.is_first:
                    whole = self._cut.whole
                    x = x.new_empty(len(x), family.tokens(whole, *x.shape[-2:]), family.width(whole))
                    distributed.recv(x, below)
                outputs.append(part(x))
                if not self.part.is_last:
                    sending.append(distributed.isend(outputs[-1], above))
        for message in sending:
            if message is not None:  # a rank outside the group has no message to wait for
                message.wait()
        return self.share_logits(outputs, images)

    def _gradient_is_needed(self, stage: int, slot: int) -> bool:
        """Whether anything below `stage` is trained by a micro-batch."""
        plan = self.executor.plan
        if plan is None or self.executor.trains_embeddings:
            return True
        row = plan.for_replica(self._placement.layout.replica)[slot]
        return bool((row[self._placement.stage < stage] == Operation.FULL).any())

    def _before_forward(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            self._row = ExitStack()
            self._row.enter_context(self.executor.micro_batch(self._slot))
            self._row.enter_context(phase("forward"))
            self._slot += 1

    def _after_forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._row is not None:
            self._row.close()
            self._row = None


_WHOLE_MESSAGES = {"pipe_partitioned": False, "grad_partitioned": False}
"""Keeps messages between stages whole: DeepSpeed would cut them over the tensor-parallel ranks, for one size of
micro-batch only."""
