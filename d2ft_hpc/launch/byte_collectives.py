"""Payloads of bytes, of whatever lengths, over a group of torch.distributed; RuntimeError where it fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

_SHORT_BYTES = 1 << 16


def broadcast_bytes(payload: bytes, group: Any = None, device: str = "cpu") -> bytes:
    """The payload of rank 0. device: on which the group takes tensors."""
    size = torch.tensor([len(payload)], device=device)
    distributed.broadcast(size, 0, group=group)
    own = payload if distributed.get_rank() == 0 else b""
    buffer = _padded(own, int(size), device)
    distributed.broadcast(buffer, 0, group=group)
    return _unpadded(buffer, int(size))


def all_gather_bytes(payload: bytes, group: Any = None, device: str = "cpu") -> list[bytes]:
    """The payload of each rank."""
    sizes = _all_gather(torch.tensor([len(payload)], device=device), group)
    every = _all_gather(_padded(payload, int(sizes.max()), device), group)
    return [_unpadded(of_rank, int(size)) for of_rank, size in zip(every, sizes, strict=True)]


def _all_gather(own: Tensor, group: Any) -> Tensor:
    """[rank, ...]: the tensor of each rank.

    gloo passes on along a ring, where each of N ranks waits N - 1 times; what is short goes faster by way of rank 0.
    """
    every = own.new_empty((distributed.get_world_size(), *own.shape))
    if own.is_cuda or own.nbytes > _SHORT_BYTES:
        distributed.all_gather(list(every), own, group=group)
    else:
        distributed.gather(own, list(every) if distributed.get_rank() == 0 else None, dst=0, group=group)
        distributed.broadcast(every, 0, group=group)
    return every


def _padded(data: bytes, size: int, device: str) -> Tensor:
    """uint8 [max(size, 1)] that starts with the data."""
    return torch.frombuffer(bytearray(data.ljust(max(size, 1), b"\0")), dtype=torch.uint8).to(device)


def _unpadded(buffer: Tensor, size: int) -> bytes:
    return bytes(buffer[:size].cpu().numpy().tobytes())
