"""DeepSpeed's data parallelism over models that are cut by head: each replica is a group of tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from d2ft_hpc.engines.deepspeed import DeepSpeedEngine
from d2ft_hpc.engines.deepspeed_private import grid_of, import_deepspeed
from d2ft_hpc.engines.engine import LossFunction, evaluated
from d2ft_hpc.engines.model_parallel import CutEngine, CutModel, share_part
from d2ft_hpc.parallel.model_part import ModelPart


class TensorParallelEngine(CutEngine, DeepSpeedEngine):
    """Trains one tensor-parallel rank's heads of one replica. torch.distributed must be initialised."""

    def __init__(
        self, cut: CutModel, loss_function: LossFunction, config: Mapping[str, Any], **options: Any
    ) -> None:
        """config: DeepSpeed's. options: `slot_source` and `is_boundary` of DeepSpeedEngine."""
        import_deepspeed().init_distributed(auto_mpi_discovery=False)
        grid = grid_of(cut.placement.layout)
        self.part = ModelPart(cut.whole, cut.placement.blocks, cut.executor)
        shared = share_part(self.part, cut, grid.get_slice_parallel_group())
        self._replica_group = grid.get_model_parallel_group()
        self._cut = cut
        super().__init__(
            self.part,
            shared,
            *cut.make_optimizer(self.part),
            loss_function,
            config,
            **{"mpu": grid, **options, **cut.options_for(self.part)},
        )

    def logits(self, images: Sequence[Tensor]) -> list[Tensor]:
        return self.share_logits(evaluated(self.part, images), images)
