"""Linear layers with peft's LoRA: which ones run by head, what heads own of them, and what the low-rank part adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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


def is_linear(layer: nn.Module) -> bool:
    """A Linear, or one with peft's plain LoRA."""
    return type(layer) is nn.Linear or (_has_lora(layer) and not _variants(layer))


def _has_lora(layer: nn.Module) -> bool:
    factors = getattr(layer, "lora_A", None)  # AdaLoRA's are bare parameters
    return type(getattr(layer, "base_layer", None)) is nn.Linear and isinstance(factors, nn.ModuleDict)


def _variants(layer: Any) -> set[str]:
    """What of a layer's LoRA changes more than a low-rank sum."""
    if any(getattr(layer, "use_dora", {}).values()):
        return {"DoRA"}
    if any(getattr(layer, "lora_bias", {}).values()):
        return {"lora_bias"}
    return {type(variant).__name__ for variant in getattr(layer, "lora_variant", {}).values()}


def unfit_layers(block: nn.Module, layers: Mapping[str, Sequence[str]]) -> list[str]:
    """Which of these layers, names in the block by role, cannot run by head, as phrases whose subject is the
    block."""
    named = ((name, block.get_submodule(name)) for names in layers.values() for name in names)
    return [f"has {name} {_unfit(layer)}" for name, layer in named if not is_linear(layer)]


def _unfit(layer: nn.Module) -> str:
    if _has_lora(layer):
        return f"with peft's {' and '.join(sorted(_variants(layer)))}; of its LoRA only the plain one is supported"
    return f"of class {type(layer).__name__}, not Linear, nor Linear with peft's plain LoRA"


def axes_of(
    block: nn.Module, own: Mapping[str, HeadAxis], layers: Mapping[str, Sequence[str]]
) -> dict[str, HeadAxis]:
    """`own`, by names in the block, without those of parameters that it lacks, and LoRA's of its `layers`, by role."""
    axes = {name: axis for name, axis in own.items() if parameter_of(block, name) is not None}
    for names in layers.values():
        for name in names:
            axes |= _adapter_axes(block.get_submodule(name), name, axes)
    return axes


def parameter_of(block: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(block.get_submodule(path), last)


def _adapter_axes(layer: Any, name: str, axes: Mapping[str, HeadAxis]) -> dict[str, HeadAxis]:
    """The splits of a layer with LoRA: its weights under peft's names, and the factors that heads own."""
    more: dict[str, HeadAxis] = {}
    if type(layer) is nn.Linear:
        return more
    for kind in ("weight", "bias"):
        if f"{name}.{kind}" in axes:
            more[f"{name}.base_layer.{kind}"] = axes[f"{name}.{kind}"]
    of_weight = axes[f"{name}.weight"]
    for adapter, down in layer.lora_A.items():
        if of_weight.splits_rows:
            shape = (*of_weight.view_shape[:-1], down.out_features)
            more[f"{name}.lora_B.{adapter}.weight"] = replace(of_weight, view_shape=shape)
        else:
            shape = (down.out_features, *of_weight.view_shape[1:])
            more[f"{name}.lora_A.{adapter}.weight"] = replace(of_weight, view_shape=shape)
    return more
