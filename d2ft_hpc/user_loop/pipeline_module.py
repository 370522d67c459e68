"""A model to be cut into pipeline stages: what DeepSpeed's PipelineModule is for a list of layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from d2ft_hpc.engines.engine import LossFunction


@dataclass(frozen=True)
class PipelineModule:
    """For `d2ft_hpc.initialize`, which cuts a timm model into stages by the FLOPs of its layers and returns an engine
    with DeepSpeed's `train_batch`.

    loss_fn: mean loss of logits and labels. num_stages: None: "pipeline": {"stages": N} in DeepSpeed's configuration.
    """

    layers: nn.Module
    loss_fn: LossFunction
    num_stages: int | None = None
