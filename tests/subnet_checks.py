"""What every family's tests ask of the subnets of a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.scores.gradient_observer import GradientObserver


def assert_heads_own_whole_parameters(model: nn.Module, subnets: SubnetMap) -> None:
    """Each parameter that heads own is theirs without gap or overlap."""
    for block, name, parameter in subnets.parameters(model):
        axis = subnets.head_axes[name]
        assert axis.parameter_shape == parameter.shape, (block, name)
        assert axis.sum_by_head(torch.ones_like(parameter)).tolist() == axis.entries.tolist()


def assert_fisher_is_of_own_gradients(
    model: nn.Module, subnets: SubnetMap, loss: Callable[[], Tensor]
) -> None:
    """loss: of one micro-batch, whose gradients' squares are what is observed."""
    observer = GradientObserver(model, subnets, 1, lambda: 0, lambda: 1.0)
    loss().backward()
    observer.close()
    expected = torch.zeros(subnets.shape)
    for block, name, parameter in subnets.parameters(model):
        assert parameter.grad is not None
        expected[block] += subnets.head_axes[name].sum_by_head(parameter.grad.square())
    torch.testing.assert_close(observer.sums[0], expected, rtol=1e-4, atol=1e-9)
