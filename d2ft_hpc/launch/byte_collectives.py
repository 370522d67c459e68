"""Payloads of bytes, of whatever lengths, over a group of torch.distributed; RuntimeError where it fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


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
    own_size = torch.tensor([len(payload)], device=device)
    sizes = [torch.zeros_like(own_size) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, own_size, group=group)
    own = _padded(payload, max(map(int, sizes)), device)
    buffers = [torch.empty_like(own) for _ in sizes]
    distributed.all_gather(buffers, own, group=group)
    return [_unpadded(buffer, int(size)) for buffer, size in zip(buffers, sizes, strict=True)]


def _padded(data: bytes, size: int, device: str) -> Tensor:
    """uint8 [max(size, 1)] that starts with the data."""
    return torch.frombuffer(bytearray(data.ljust(max(size, 1), b"\0")), dtype=torch.uint8).to(device)


def _unpadded(buffer: Tensor, size: int) -> bytes:
    return bytes(buffer[:size].cpu().numpy().tobytes())
