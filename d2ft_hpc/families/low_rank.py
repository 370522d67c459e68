"""The low-rank part of a linear layer under a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ft_hpc.families.head_axis import HeadAxis


def with_lora(
    layer: Any, name: str, head_axes: Mapping[str, HeadAxis], x: Tensor, heads: Tensor, output: Tensor
) -> Tensor:
    """`output` of some heads of layer `name` plus what peft's LoRA adds to it; `output` itself for a plain layer.

    x: what the layer got for these heads. Parts that heads share (see model/lora.py) are used whole.
    """
    if type(layer) is nn.Linear or layer.disable_adapters or layer.merged:
        return output
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if axis := head_axes.get(f"{name}.lora_A.{adapter}.weight"):
            down = axis.select(down, heads)
        if axis := head_axes.get(f"{name}.lora_B.{adapter}.weight"):
            up = axis.select(up, heads)
        # peft may keep factors in float32 beside weights in bfloat16.
        low_rank = F.linear(layer.lora_dropout[adapter](x).to(down.dtype), down)
        output = torch.add(output, F.linear(low_rank, up).to(output.dtype), alpha=layer.scaling[adapter])
    return output
