"""The engine that a configuration asks for."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2ft_hpc.config import RunConfig
from d2ft_hpc.engines.ddp import DdpEngine
from d2ft_hpc.engines.deepspeed import DeepSpeedEngine, deepspeed_config
from d2ft_hpc.engines.engine import Engine, LossFunction
from d2ft_hpc.engines.fsdp import FsdpEngine
from d2ft_hpc.engines.optimizer import build_optimizer, build_schedule
from d2ft_hpc.engines.pipeline import PipelineEngine
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.engines.tensor import TensorParallelEngine
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.launch import Control
from d2ft_hpc.parallel.layout import Placement


def build_engine(
    config: RunConfig,
    model: VisionTransformer,
    executor: PlanExecutor,
    placement: Placement,
    total_steps: int,
    loss_function: LossFunction,
    control: Control,
) -> Engine:
    """On all ranks together. Raises ConfigError where the engine cannot run what is asked.

    model: the whole one; where each rank holds a part of it only, the engine trains a copy of that part.
    """
    if config.engine.activation_checkpointing:
        _recompute_blocks(model)

    def make_optimizer(part: VisionTransformer) -> tuple[Optimizer, LRScheduler]:
        optimizer = build_optimizer(part, config.optimizer)
        return optimizer, build_schedule(optimizer, config.optimizer, total_steps)

    low_dtype = torch.bfloat16 if config.engine.precision == "bf16" else None
    clipping = config.engine.gradient_clipping
    if config.engine.name == "plain":
        return PlainEngine(
            model,
            executor,
            *make_optimizer(model),
            loss_function,
            autocast_dtype=low_dtype,
            gradient_clipping=clipping,
            cuda_graphs=config.engine.cuda_graphs and next(model.parameters()).device.type == "cuda",
        )
    if config.engine.name == "ddp":
        return DdpEngine(
            model,
            executor,
            *make_optimizer(model),
            loss_function,
            autocast_dtype=low_dtype,
            gradient_clipping=clipping,
        )
    if config.engine.name == "fsdp2":
        return FsdpEngine(
            model,
            executor,
            placement,
            make_optimizer,
            loss_function,
            param_dtype=low_dtype,
            gradient_clipping=clipping,
        )
    settings = deepspeed_settings(config)
    if not placement.layout.is_cut:
        return DeepSpeedEngine(model, executor, *make_optimizer(model), loss_function, settings)
    kind = PipelineEngine if placement.layout.stages > 1 else TensorParallelEngine
    return kind(model, executor, placement, make_optimizer, loss_function, settings, control)


def deepspeed_settings(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's whole configuration. Raises ConfigError where it cannot run plans or DeepSpeed does not know it."""
    return deepspeed_config(
        config.engine.deepspeed,
        micro_batch_size=config.data.micro_batch_size,
        slots=config.data.slots,
        precision=config.engine.precision,
        gradient_clipping=config.engine.gradient_clipping,
    )


def _recompute_blocks(model: VisionTransformer) -> None:
    """Lets timm recompute blocks in the backward without torch's reentrant way, which loses the gradients of a block
    above frozen embeddings."""
    try:
        from timm.layers import set_reentrant_ckpt
    except ImportError:
        raise ConfigError(
            "engine.activation_checkpointing=true: this timm always recomputes in torch's reentrant way, which loses "
            "gradients above frozen embeddings; update timm, or do without"
        ) from None
    set_reentrant_ckpt(False)
    model.set_grad_checkpointing(True)
