"""LoRA (arXiv 2106.09685) on the blocks' qkv, proj, fc1 and fc2, by the library peft.

By head: B of qkv and fc1 (rows) and A of proj and fc2 (columns) belong to the heads; A of qkv and fc1 and B of proj and
fc2 are shared by all heads of a block and take the gradients of those that are FULL.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from d2ft_hpc.errors import ConfigError
from d2ft_hpc.extras import cannot_import
from d2ft_hpc.families.table import family_of
from d2ft_hpc.files import atomic
from d2ft_hpc.model.subnets import ParameterClass, SubnetMap

ADAPTER = "default"


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    layers: Sequence[str] = ("qkv", "proj", "fc1", "fc2"),
) -> None:
    """Adapts `layers` of every block; everything else except the classifier is frozen.

    alpha: the low-rank product counts alpha / rank times.

    Raises ConfigError if peft is not installed, or the rank is above that of a layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(f"model.lora: {cannot_import(error, 'peft', 'lora')}") from None
    family = family_of(model)
    names = [
        name
        for role, of_role in family.layers(family.blocks(model)[0]).items()
        if role in layers
        for name in of_role
    ]
    blocks, inner = (re.escape(family.blocks_path), "|".join(map(re.escape, names)))
    target = rf"{blocks}\.\d+\.({inner})"
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and re.fullmatch(target, name):
            most = min(layer.in_features, layer.out_features)
            if rank > most:
                raise ConfigError(
                    f"model.lora.rank={rank}: {name} is {layer.in_features} x {layer.out_features}, whose rank is at "
                    f"most {most}; use less, such as 8"
                )
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target)
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    subnets = SubnetMap.of(model)
    for name, parameter in model.named_parameters():
        if subnets.classify(name) is ParameterClass.CLASSIFIER:
            parameter.requires_grad_(True)


def timm_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state in timm's names, low-rank products added to the weights that they adapt."""
    state = dict(model.state_dict())
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            for key in [key for key in state if key.startswith(f"{name}.")]:
                value = state.pop(key)
                if key.startswith(f"{name}.base_layer."):
                    state[key.replace(".base_layer.", ".")] = value
            weight = state[f"{name}.weight"]
            with torch.no_grad():
                state[f"{name}.weight"] = weight + layer.get_delta_weight(ADAPTER).to(weight)
    return state


def save_adapter(model: Any, folder: Path) -> None:
    """Writes what was trained, as `PeftModel.from_pretrained(timm_model, folder)` reads it.

    model: one that `add_lora` adapted, or its twin. The classifier and the final norm go with it, as peft's
    `modules_to_save`.
    """
    subnets = SubnetMap.of(model)
    tensors: dict[str, Tensor] = {}
    saved_modules: set[str] = set()
    for name, value in model.state_dict().items():
        if f".{ADAPTER}." in name:
            tensors[name.replace(f".{ADAPTER}.", ".")] = value
        elif subnets.classify(name) is ParameterClass.CLASSIFIER:
            tensors[name] = value
            saved_modules.add(name.rsplit(".", 1)[0])
    config = copy(model.peft_config[ADAPTER])
    config.modules_to_save, config.inference_mode = sorted(saved_modules), True
    prefixed = {
        f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in tensors.items()
    }
    building = folder.with_name(f".{folder.name}.tmp")
    config.save_pretrained(building)
    save_file(prefixed, building / "adapter_model.safetensors", metadata={"format": "pt"})
    atomic.replace_folder(building, folder)
