"""What a results file says about machine, software and model: versions and counts, but no environment variables."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import nn

from d2ft_hpc.launch import Control
from d2ft_hpc.metering import StepCosts
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.parallel.rank_layout import RankLayout
from d2ft_hpc.results.schema import Scalar

_PACKAGES = (
    "d2ft-hpc",
    "torch",
    "torchvision",
    "timm",
    "deepspeed",
    "mpi4py",
    "mpich",
    "highspy",
    "h5py",
    "numpy",
)
ABSENT = "absent"


def describe_environment(
    control: Control, layout: RankLayout, launcher: str, device: torch.device
) -> dict[str, str | int]:
    """Attributes for the results file."""
    return {
        "launcher": launcher,
        "world_size": control.world_size,
        "replicas": layout.replicas,
        "pipeline_stages": layout.stages,
        "tensor_ranks": layout.tensor_ranks,
        "host": control.host,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_count": os.cpu_count() or 0,
        "threads_per_rank": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: installed_version(package) for package in _PACKAGES},
    }


def installed_version(package: str) -> str:
    """The version of an installed package, else `ABSENT`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ABSENT


def describe_model(
    model: nn.Module, subnets: SubnetMap, costs: StepCosts
) -> tuple[dict[str, Any], dict[str, Scalar]]:
    """Datasets and attributes for the results file: each parameter's name, size and class, how many each subnet owns,
    and what passes cost."""
    owned = np.zeros(subnets.shape, np.int64)
    for block, name, _ in subnets.parameters(model):
        owned[block] += subnets.head_axes[name].entries
    named = list(model.named_parameters())
    datasets = {
        "parameter": np.array([name for name, _ in named]),
        "parameter_size": np.array([parameter.numel() for _, parameter in named]),
        "parameter_class": np.array([subnets.classify(name).value for name, _ in named]),
        "parameter_trained": np.array([parameter.requires_grad for _, parameter in named], np.uint8),
        "subnet_parameters": owned,
    }
    return datasets, {
        "num_blocks": subnets.num_blocks,
        "num_heads": subnets.num_heads,
        "frozen_blocks": json.dumps(np.flatnonzero(~costs.trains).tolist()),
        "always_flops": costs.always_flops,
        "full_flops": costs.full_flops,
        "forward_only_flops": costs.forward_only_flops,
    }
