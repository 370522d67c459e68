"""What a results file says of the machine and the software: versions and counts, no environment variables."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from d2ft_hpc.launch import Control
from d2ft_hpc.parallel.layout import Layout

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


def describe_environment(
    control: Control, layout: Layout, launcher: str, device: torch.device
) -> dict[str, str | int]:
    """Attributes for the results file."""
    described: dict[str, str | int] = {
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
    }
    for package in _PACKAGES:
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = "absent"
    return described
