"""Checks of ranks, GPUs, network and software."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from d2ft_hpc.doctor.finding import Finding, of_error
from d2ft_hpc.errors import LaunchError
from d2ft_hpc.launch import Control, device_type_of, gathered
from d2ft_hpc.launch.control import describe_ranks
from d2ft_hpc.metering.all_reduce import fastest_all_reduce
from d2ft_hpc.recording.provenance import ABSENT, installed_version

_PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "mpi4py", "highspy", "h5py", "numpy", "safetensors")
_MESSAGE_BYTES = 16 << 20
_SLOW_BETWEEN_HOSTS = 1e9
"""Bytes a second of a GPU all-reduce between hosts, below which NCCL does not use the fast network."""


def check_versions(control: Control) -> list[Finding]:
    """On all ranks together."""
    own = {name: installed_version(name) for name in _PACKAGES}
    of_ranks = gathered(control, own)
    findings = []
    for name in _PACKAGES:
        other = [rank for rank, versions in enumerate(of_ranks) if versions[name] != of_ranks[0][name]]
        if other:
            findings.append(
                Finding(
                    "versions",
                    "failed",
                    f"{name} is {of_ranks[0][name]} on rank 0 and {of_ranks[other[0]][name]} on "
                    f"{describe_ranks(other, control.hosts)}",
                    "start the same environment on every node: one venv on a shared file system, or one container",
                )
            )
    absent = [name for name, version in own.items() if version == ABSENT]
    if absent:
        text = f"not installed: {', '.join(absent)}"
        findings.append(Finding("versions", "failed", text, f"pip install {' '.join(absent)}"))
    shown = ", ".join(f"{name} {own[name]}" for name in ("torch", "deepspeed", "mpi4py", "h5py"))
    return findings or [Finding("versions", "ok", f"{shown} on all ranks")]


def check_gpus(control: Control, device: torch.device, asked_for: Literal["auto", "cpu", "cuda"]) -> Finding:
    """On all ranks together. asked_for: by the configuration."""
    if device.type == "cpu":
        try:
            device_type_of(asked_for)
        except LaunchError as error:
            return of_error("gpus", error, "set engine.device=cpu")
        asked = next((v for v in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE") if os.environ.get(v)), None)
        if asked is None and not Path("/dev/nvidia0").exists():
            return Finding("gpus", "ok", "no GPU here; the run takes the CPU")
        sign = f"{asked}={os.environ[asked]}" if asked else "/dev/nvidia0 exists"
        return Finding(
            "gpus",
            "warning",
            f"{sign}, but the run would take the CPU: torch {torch.__version__} sees no GPU here",
            "install a CUDA build of torch that fits the driver (nvidia-smi), or set engine.device=cpu",
        )
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    own = f"{control.host} {getattr(properties, 'uuid', torch.cuda.current_device())}"
    of_ranks = gathered(control, own)
    shared = [rank for rank, gpu in enumerate(of_ranks) if of_ranks.count(gpu) > 1]
    if shared:
        return Finding(
            "gpus",
            "failed",
            f"{describe_ranks(shared, control.hosts)} share a GPU",
            "one task a GPU: --ntasks-per-node equal to --gpus-per-node",
        )
    return Finding(
        "gpus", "ok", f"a {properties.name} for each rank, {properties.total_memory / 2**30:.0f} GiB"
    )


def check_all_reduce(control: Control, device: torch.device) -> list[Finding]:
    """On all ranks together."""
    if control.world_size == 1:
        return []
    seconds = max(gathered(control, fastest_all_reduce(_MESSAGE_BYTES // 4, device)))
    share = 2 * (control.world_size - 1) / control.world_size
    bandwidth = share * _MESSAGE_BYTES / seconds
    backend = "NCCL" if device.type == "cuda" else "gloo"
    text = f"{backend} reduces 16 MiB at {bandwidth / 1e9:.2f} GB/s (bus bandwidth)"
    if device.type == "cuda" and len(set(control.hosts)) > 1 and bandwidth < _SLOW_BETWEEN_HOSTS:
        fix = "name the fast network: NCCL_SOCKET_IFNAME, NCCL_IB_HCA, FI_PROVIDER; NCCL_DEBUG=INFO shows what is used"
        return [Finding("all-reduce", "warning", text, fix)]
    return [Finding("all-reduce", "ok", text)]
