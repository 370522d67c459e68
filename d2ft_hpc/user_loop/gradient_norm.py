"""The norm of a model's gradients, whole or spread over ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def total_norm(model: nn.Module) -> Tensor | None:
    """L2 norm of all gradients, float32 scalar on their device; None where there are none.

    Parts that ranks hold are summed over these, so that all of them call it together.
    """
    by_mesh: dict[object, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault((mesh, parameter.device), []).append(parameter.grad)
    norms = [nn.utils.get_total_norm(gradients) for gradients in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if not whole:
        return None
    return torch.stack([norm.detach().to(whole[0].device).float() for norm in whole]).square().sum().sqrt()
