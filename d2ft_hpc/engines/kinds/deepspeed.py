"""Engine `deepspeed`: ZeRO, and where each rank holds a part of the model, pipelines and tensor parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2ft_hpc.engines.kinds.kind import EngineKind, Request
from d2ft_hpc.planning.communication_volume import ZERO, DataParallel

if TYPE_CHECKING:
    from d2ft_hpc.config import EngineConfig, RunConfig
    from d2ft_hpc.engines.engine import Engine


class DeepSpeed(EngineKind):
    name = "deepspeed"
    about = "ZeRO, pipelines, tensor parallelism"
    libraries = ("torch", "deepspeed")
    scales_losses = True
    reads_deepspeed = True
    has_pipeline = True
    cuts_heads = True

    def check(self, config: RunConfig) -> None:
        engine = config.engine
        if engine.deepspeed.get("pipeline", {}).get("stages", "auto") not in ("auto", engine.pipeline_stages):
            raise ValueError(
                f"engine.deepspeed.pipeline.stages={engine.deepspeed['pipeline']['stages']}: set "
                f"engine.pipeline_stages instead"
            )
        autotp = engine.deepspeed.get("tensor_parallel", {})
        if extra := sorted(set(autotp) - {"autotp_size"}):
            raise ValueError(
                f"engine.deepspeed.tensor_parallel.{extra[0]}: blocks are cut by head; keep autotp_size alone, or set "
                f"engine.tensor_parallel"
            )
        if engine.tensor_parallel not in (1, engine.tensor_ranks):
            raise ValueError(
                f"engine.tensor_parallel={engine.tensor_parallel}, but engine.deepspeed.tensor_parallel.autotp_size="
                f"{autotp['autotp_size']}: remove one of them"
            )
        super().check(config)

    def _check_parts(self, config: RunConfig) -> None:
        super()._check_parts(config)
        engine, parts = config.engine, config.engine.parts
        for key in ("pipe_partitioned", "grad_partitioned"):
            if engine.deepspeed.get("pipeline", {}).get(key, False):
                raise ValueError(
                    f"engine.deepspeed.pipeline.{key}: DeepSpeed then keeps the first micro-batch's size, which the "
                    f"last batch of an epoch does not have; remove it"
                )
        if engine.pipeline_stages > 1 and engine.zero_stage == 1 and config.optimizer.classifier_factor != 1:
            raise ValueError(
                f"optimizer.classifier_factor={config.optimizer.classifier_factor} with {parts} and ZeRO 1: DeepSpeed "
                f"sums norms by parameter group, and only the last stage has the classifier's; use 1, or ZeRO 0"
            )
        if engine.pipeline_stages > 1 and engine.zero_stage > 1:
            raise ValueError(
                f"engine.deepspeed.zero_optimization.stage={engine.zero_stage} with {parts}: a pipeline's stages "
                f"keep their gradients until the batch's end, and DeepSpeed refuses; use stage 0 or 1"
            )

    def prepare(self, config: RunConfig) -> None:
        _settings(config)

    def data_parallel(self, engine: EngineConfig) -> DataParallel:
        return dict(enumerate(ZERO)).get(engine.zero_stage, ZERO[0])

    def build(self, asked: Request) -> Engine:
        from d2ft_hpc.engines.deepspeed import DeepSpeedEngine
        from d2ft_hpc.engines.model_parallel import CutModel
        from d2ft_hpc.engines.pipeline import PipelineEngine
        from d2ft_hpc.engines.tensor import TensorParallelEngine

        settings, layout = _settings(asked.config), asked.placement.layout
        if not layout.is_cut:
            optimizer = asked.make_optimizer(asked.model)
            return DeepSpeedEngine(
                asked.model, asked.executor, *optimizer, asked.loss_function, settings, flattens=True
            )
        kind = PipelineEngine if layout.stages > 1 else TensorParallelEngine
        cut = CutModel(asked.model, asked.executor, asked.placement, asked.control, asked.make_optimizer)
        return kind(cut, asked.loss_function, settings)


def _settings(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's whole configuration. Raises ConfigError where it cannot run plans or DeepSpeed does not know it."""
    from d2ft_hpc.engines.deepspeed import deepspeed_config

    return deepspeed_config(
        config.engine.deepspeed,
        micro_batch_size=config.data.micro_batch_size,
        slots=config.data.slots,
        precision=config.engine.precision,
        gradient_clipping=config.engine.gradient_clipping,
    )
