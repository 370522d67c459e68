"""DeepSpeed's data parallelism over models that are cut by head: each replica is a group of tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from d2ft_hpc.engines.deepspeed import DeepSpeedEngine
from d2ft_hpc.engines.deepspeed_private import grid_of, import_deepspeed
from d2ft_hpc.engines.engine import LossFunction, StateWriter, evaluated
from d2ft_hpc.engines.model_parallel import (
    MakeOptimizer,
    OptionsFor,
    full_model,
    load_state,
    no_options,
    save_state,
    share_logits,
    share_part,
)
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.launch import Control
from d2ft_hpc.parallel.model_part import ModelPart
from d2ft_hpc.parallel.rank_layout import Placement


class TensorParallelEngine(DeepSpeedEngine):
    """Trains one tensor-parallel rank's heads of one replica. torch.distributed must be initialised."""

    def __init__(
        self,
        model: nn.Module,
        executor: PlanExecutor,
        placement: Placement,
        make_optimizer: MakeOptimizer,
        loss_function: LossFunction,
        config: Mapping[str, Any],
        control: Control,
        *,
        slot_source: Callable[[], int] | None = None,
        is_boundary: Callable[[], bool] | None = None,
        options_for: OptionsFor = no_options,
    ) -> None:
        """model: the whole one; the ranks copy their parts of it. executor: attached to it. config: DeepSpeed's.
        slot_source: as `PlanExecutor.bind` takes it. is_boundary: as `ZeroRules.prepare` takes it."""
        import_deepspeed().init_distributed(auto_mpi_discovery=False)
        grid = grid_of(placement.layout)
        self._part = ModelPart(model, placement.blocks, executor)
        shared = share_part(self._part, executor, placement, grid.get_slice_parallel_group())
        self._replica_group = grid.get_model_parallel_group()
        self._whole, self._placement, self._control = model, placement, control
        super().__init__(
            self._part,
            shared,
            *make_optimizer(self._part),
            loss_function,
            config,
            slot_source=slot_source,
            is_boundary=is_boundary,
            mpu=grid,
            **options_for(self._part),
        )

    @property
    def part(self) -> ModelPart:
        return self._part

    def logits(self, images: Sequence[Tensor]) -> list[Tensor]:
        own = evaluated(self._part, images)
        return share_logits(own, images, self._part, self._placement.layout, self._replica_group)

    def save(self, folder: Path, write: StateWriter) -> None:
        save_state(folder, write, self._part, self.engine, self.executor, self._placement, self._control)

    def restore(self, folder: Path) -> None:
        load_state(folder, self._part, self.engine, self.executor, self._placement)

    def full_model(self) -> AbstractContextManager[nn.Module]:
        return full_model(self._whole, self._part, self.executor, self._placement, self._control)
