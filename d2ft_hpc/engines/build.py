"""The engine that a configuration asks for."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer

from d2ft_hpc.config import RunConfig
from d2ft_hpc.engines.deepspeed import DeepSpeedEngine, deepspeed_config
from d2ft_hpc.engines.engine import Engine, LossFunction
from d2ft_hpc.engines.optimizer import build_optimizer, build_schedule
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.execution.executor import PlanExecutor


def build_engine(
    config: RunConfig,
    model: VisionTransformer,
    executor: PlanExecutor,
    total_steps: int,
    loss_function: LossFunction,
) -> Engine:
    """On all ranks together. Raises ConfigError where the engine cannot run what is asked."""
    optimizer = build_optimizer(model, config.optimizer)
    schedule = build_schedule(optimizer, config.optimizer, total_steps)
    if config.engine.name == "plain":
        return PlainEngine(
            model,
            executor,
            optimizer,
            schedule,
            loss_function,
            autocast_dtype=torch.bfloat16 if config.engine.precision == "bf16" else None,
            gradient_clipping=config.engine.gradient_clipping,
            cuda_graphs=config.engine.cuda_graphs and next(model.parameters()).device.type == "cuda",
        )
    settings = deepspeed_config(
        config.engine.deepspeed,
        micro_batch_size=config.data.micro_batch_size,
        slots=config.data.slots,
        precision=config.engine.precision,
        gradient_clipping=config.engine.gradient_clipping,
    )
    return DeepSpeedEngine(model, executor, optimizer, schedule, loss_function, settings)
