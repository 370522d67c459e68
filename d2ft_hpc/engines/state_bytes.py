"""Memory that a rank's training will take beside its weights and activations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from d2ft_hpc.engines.gradient_norm import local


def bytes_to_come(trained: Sequence[nn.Parameter], optimizer: Optimizer, gradient_ranks: int = 1) -> float:
    """Bytes of gradients and of the optimiser's state that are not on this rank's device yet.

    trained: parameters whose gradients the backward makes. optimizer: torch's AdamW or SGD over them, or over flat
    parts of them as in ZeRO. gradient_ranks: how many ranks share each gradient.
    """
    gradients = sum(_full_bytes(each) for each in trained if each.grad is None) / gradient_ranks
    known, device = {id(each) for each in trained}, trained[0].device
    state = 0
    for group in optimizer.param_groups:
        moments = 2 if "betas" in group else int(group.get("momentum", 0) > 0)
        for each in group["params"]:
            if each.device == device:  # not offloaded
                of_part = each.grad is None and id(each) not in known
                state += local(each).nbytes * (of_part + moments * (not optimizer.state.get(each)))
    return float(gradients + state)


def _full_bytes(parameter: nn.Parameter) -> int:
    """ZeRO 3 leaves an empty tensor in a parameter's place and notes its size."""
    elements: int = getattr(parameter, "ds_numel", local(parameter).numel())
    return elements * parameter.element_size()
