"""Gradients for engines that reduce them while the backward pass still runs (DeepSpeed's ZeRO, DDP, FSDP2).

Such an engine fills its messages in the order in which parameters get their gradients. A replica that skips a block,
or runs part of its heads, gives fewer gradients or in another order than the replicas that it reduces with: the
messages would differ between replicas, which stalls or silently corrupts the sum. `one_point` makes every trainable
parameter of a block get its gradient at one point of the backward pass, in the block's own order, zero where nothing
flowed, whatever ran inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn


class Reduction(Enum):
    """When an engine reduces gradients between replicas."""

    AFTER_BACKWARD = "after the backward pass"
    LAST_MICRO_BATCH = "during the backward pass of a batch's last micro-batch"
    EVERY_MICRO_BATCH = "during the backward pass of every micro-batch"
    AS_LOOP_SAYS = "during the backward pass of the micro-batches that the training loop chooses"
    BY_BLOCK = (
        "by whole blocks, where the engine itself fills what is missing with zeros (ZeRO-3's leaf modules)"
    )

    def may_happen_in(self, slot: int, slots: int) -> tuple[bool, ...]:
        """Whether gradients must be complete and ordered in the backward pass of micro-batch `slot` of `slots`: both
        answers where only the loop decides in which pass it reduces."""
        match self:
            case Reduction.EVERY_MICRO_BATCH:
                return (True,)
            case Reduction.LAST_MICRO_BATCH:
                return (slot == slots - 1,)
            case Reduction.AS_LOOP_SAYS:
                return (False, True)
            case _:
                return (False,)


Owners = list[tuple[dict[str, Any], str]]
"""For some parameters of a block: the dictionary in which the module keeps each one, and its name there. FSDP2
replaces the parameters for each forward pass."""


def owners_of(block: nn.Module, *, frozen_too: bool = False) -> Owners:
    """The owners of the trainable parameters, or of all."""
    return [
        (module._parameters, name)
        for module in block.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad or frozen_too
    ]


@contextmanager
def one_point(owners: Owners, x: Tensor, *, gives_gradients: bool) -> Iterator[Tensor]:
    """Inside, a block computes with stand-ins of its trainable parameters; yields what stands in for its input `x`.

    gives_gradients: whether anything that runs inside takes gradients of the block's parameters.
    """
    through = _OnePoint.apply(x, *(kept[name] for kept, name in owners))
    # An input that takes no gradient (frozen embeddings below) stays so, unless the pass must go through it.
    with stand_ins(owners, through[1:]):
        yield through[0] if x.requires_grad or not gives_gradients else x


@contextmanager
def stand_ins(owners: Owners, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, `tensors` are in the place of the parameters, under whose names modules find them."""
    own = [kept[name] for kept, name in owners]
    for (kept, name), tensor in zip(owners, tensors, strict=True):
        kept[name] = tensor
    try:
        yield
    finally:
        for (kept, name), parameter in zip(owners, own, strict=True):
            kept[name] = parameter


def zero_gradient(x: Tensor) -> Tensor:
    """`x`, whose gradient is zero instead of absent."""
    result: Tensor = _ZeroGradient.apply(x)
    return result


def in_backward() -> bool:
    """Whether a backward pass is under way, in which checkpointed modules run again."""
    # torch.compile traces forwards, and cannot trace the question.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def require_input_gradient(block: nn.Module) -> None:
    """Makes the input of `block` take a gradient in training, also above frozen embeddings.

    torch runs a module's full backward hook before the module's own gradients exist where no input needs one.
    """

    def with_gradient(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = inputs
        if module.training and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        return (x, *others)

    block.register_forward_pre_hook(with_gradient)


class _OnePoint(torch.autograd.Function):
    """The identity of all its arguments. Gradients that never came are zeros, as autograd makes them by default."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)
