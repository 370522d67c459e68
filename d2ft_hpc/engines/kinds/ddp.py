"""Engine `ddp`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2ft_hpc.engines.kinds.kind import EngineKind, Request

if TYPE_CHECKING:
    from d2ft_hpc.engines.engine import Engine


class Ddp(EngineKind):
    name = "ddp"
    about = "torch's DistributedDataParallel"

    def build(self, asked: Request) -> Engine:
        from d2ft_hpc.engines.ddp import DdpEngine

        return DdpEngine(
            asked.model,
            asked.executor,
            *asked.make_optimizer(asked.model),
            asked.loss_function,
            autocast_dtype=asked.low_dtype,
            gradient_clipping=asked.config.engine.gradient_clipping,
        )
