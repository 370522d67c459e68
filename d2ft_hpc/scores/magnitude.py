"""Scores of each subnet that its weights alone decide, such as their magnitude."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.score_table import Score


@torch.no_grad()
def scores_of_weights(score: Score, model: nn.Module, subnets: SubnetMap) -> Tensor:
    """A score that reads no gradients, summed over each subnet's weights: float32 [block, head].

    Weights that FSDP2 has spread are gathered one by one, by all ranks together. Of a model with LoRA, over the
    low-rank factors alone.
    """
    scores = torch.zeros(subnets.shape, device=next(model.parameters()).device)
    for block, name, parameter in subnets.parameters(model):
        if subnets.has_adapters and "lora_" not in name:
            continue
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        scores[block] += subnets.head_axes[name].sum_by_head(score.of_weight(whole, whole))
    return scores
