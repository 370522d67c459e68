"""Optimiser and learning-rate schedule, the same for every engine."""

from __future__ import annotations

from typing import Any

from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from d2ft_hpc.config import OptimizerConfig


def build_optimizer(model: Any, config: OptimizerConfig) -> Optimizer:
    """timm's optimiser of that name over the trainable parameters; no weight decay on norms and biases."""
    # Separate groups only where needed, since a pipeline's ZeRO-1 sums norms group by group and needs the same groups
    # on all stages.
    own_rate = config.classifier_factor != 1
    classifier = {id(parameter) for parameter in model.get_classifier().parameters() if own_rate}
    groups = []
    for group in param_groups_weight_decay(model, config.weight_decay):
        body: list[nn.Parameter] = []
        head: list[nn.Parameter] = []
        for parameter in group["params"]:
            (head if id(parameter) in classifier else body).append(parameter)
        groups.append({**group, "params": body})
        groups.append({**group, "params": head, "lr": config.learning_rate * config.classifier_factor})
    options: dict[str, Any] = (
        {"momentum": 0.9} if config.name == "sgd" else {"betas": (0.9, 0.999), "eps": config.epsilon}
    )
    if next(model.parameters()).device.type == "cuda":
        options["fused"] = True
    optimizer: Optimizer = create_optimizer_v2(
        [group for group in groups if group["params"]],
        opt=config.name,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        **options,
    )
    return optimizer


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, total_steps: int) -> LambdaLR:
    """Linear warm-up, then a line to zero at `total_steps`.

    A cosine would leave next to no learning rate for the last steps of a plan by tokens, which fit the model to full
    size: it costs a point there, and half a point in dense training (analysis/tokens).
    """
    warmup_steps = round(config.warmup_share * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return max(total_steps - step, 0) / max(total_steps - warmup_steps, 1)

    return LambdaLR(optimizer, factor)
