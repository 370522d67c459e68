"""The norm of a model's gradients, whole or spread over ranks on whatever mesh each.

torch's own cannot sum over parameters of different meshes, as those of blocks cut by head beside the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm of all of them, at least one: a float32 scalar on the first one's device.

    If any are DTensors, all ranks call it together, and the others are the same on every rank; else nothing is sent.
    """
    norms = torch._foreach_norm([local(gradient).float() for gradient in gradients])
    if is_spread := any(isinstance(gradient, DTensor) for gradient in gradients):
        # Numbers that the host has: a tensor of them would wait for the device.
        norms = torch._foreach_div(norms, [math.sqrt(_copies(gradient)) for gradient in gradients])
    squares = torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()
    if is_spread:
        dist.all_reduce(squares)
    return squares.sqrt()


def local(tensor: Tensor) -> Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copies(tensor: Tensor) -> float:
    """How many ranks hold each of its values."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    parts = [
        size
        for size, p in zip(tensor.device_mesh.shape, tensor.placements, strict=True)
        if not p.is_replicate()
    ]
    return dist.get_world_size() / math.prod(parts)
