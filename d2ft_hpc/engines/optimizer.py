"""Optimiser and learning-rate schedule, the same for every engine."""

from __future__ import annotations

import math

from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from d2ft_hpc.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """timm's optimiser of that name over the trainable parameters; no weight decay on norms and biases."""
    options = (
        {"momentum": config.momentum}
        if config.name == "sgd"
        else {"betas": tuple(config.betas), "eps": config.epsilon}
    )
    optimizer: Optimizer = create_optimizer_v2(
        model, opt=config.name, lr=config.learning_rate, weight_decay=config.weight_decay, **options
    )
    return optimizer


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, total_steps: int) -> LambdaLR:
    """Linear warm-up over `warmup_steps`, then constant or a cosine to zero at `total_steps`."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        remaining = max(total_steps - config.warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min((step - config.warmup_steps) / remaining, 1.0)))

    return LambdaLR(optimizer, factor)
