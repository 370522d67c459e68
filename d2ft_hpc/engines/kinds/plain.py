"""Engine `plain`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2ft_hpc.engines.kinds.kind import EngineKind, Request

if TYPE_CHECKING:
    from d2ft_hpc.engines.engine import Engine


class Plain(EngineKind):
    name = "plain"
    about = "one process"
    is_one_process = True
    scores_with_own_model = False
    graphs_micro_batches = True

    def build(self, asked: Request) -> Engine:
        from d2ft_hpc.engines.plain import PlainEngine

        engine = asked.config.engine
        return PlainEngine(
            asked.model,
            asked.executor,
            *asked.make_optimizer(asked.model),
            asked.loss_function,
            autocast_dtype=asked.low_dtype,
            gradient_clipping=engine.gradient_clipping,
            cuda_graphs=asked.config.launches_graphs and next(asked.model.parameters()).device.type == "cuda",
        )
