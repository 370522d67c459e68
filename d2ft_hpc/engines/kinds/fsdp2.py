"""Engine `fsdp2`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2ft_hpc.engines.kinds.kind import EngineKind, Request
from d2ft_hpc.planning.communication_volume import DataParallel

if TYPE_CHECKING:
    from d2ft_hpc.config import EngineConfig
    from d2ft_hpc.engines.engine import Engine


class Fsdp2(EngineKind):
    name = "fsdp2"
    about = "torch's fully_shard, also with tensor parallelism"
    cuts_heads = True
    why_no_samples = (
        "samples are scored by a second model that shares the weights, which FSDP2 spreads over ranks; use another "
        "planner, or engine.name=ddp"
    )

    def data_parallel(self, engine: EngineConfig) -> DataParallel:
        return "fsdp2"

    def build(self, asked: Request) -> Engine:
        from d2ft_hpc.engines.fsdp import FsdpEngine

        return FsdpEngine(
            asked.model,
            asked.executor,
            asked.placement,
            asked.make_optimizer,
            asked.loss_function,
            param_dtype=asked.low_dtype,
            gradient_clipping=asked.config.engine.gradient_clipping,
            slots=asked.config.data.slots,
        )
