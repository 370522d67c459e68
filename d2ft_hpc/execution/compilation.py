"""When torch.compile may make kernels; and kernels for what a model computes below and above its blocks. Eagerly
these parts are a dozen memory-bound kernels, which in a small model take as long as a block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from d2ft_hpc.execution.copies import set_outside_copies
from d2ft_hpc.families.family import BlockFamily


def cannot_compile() -> bool:
    """Whether a compilation is going on, or a mode that counts operators is on. Such a mode sees no operators in a
    compiled function, and a function that is first compiled under it is never compiled later."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def keep_mode_after_compiled_call() -> None:
    """For a mode that a hook has just entered, in a compiled call perhaps, so that it goes on after it. At the end of
    such a call torch puts dispatch keys back to what they were before it, and a mode sees few operators from then on.

    torch has had these functions since 2.14; before, a backward outside a compiled model is not seen whole.
    """
    if not hasattr(torch._C, "_dynamo_restore_local_dispatch_key_set"):
        return
    with torch._C._PreserveDispatchKeyGuard():
        try:
            torch._C._dynamo_restore_local_dispatch_key_set()
        except RuntimeError:  # no compiled call is under way
            return
        for key in ("Python", "PythonTLSSnapshot"):
            torch._C._dispatch_tls_set_dispatch_key_included(key, True)
        torch._C._dynamo_save_local_dispatch_key_set()


def allow_kernels_of(micro_batches: int) -> None:
    """Lets torch.compile of a whole model, which is the user's own, make kernels for this many more micro-batches.

    Each runs other heads, for which a compiled model is traced anew; beyond its limit of 8 torch would run eagerly,
    and say so only in its log.
    """
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        # Twice, since gradients may come at one point or not; the default limit is for the dense model in both modes.
        setattr(dynamo_config, name, getattr(dynamo_config, name) + 2 * micro_batches)


def compile_outside_blocks(
    model: nn.Module, family: BlockFamily, scaled: Callable[[Tensor], AbstractContextManager[Tensor]]
) -> None:
    """Lets the model compute its embeddings and its classifier through torch.compile in training, of images that
    `scaled` brings to their resolution.

    Each shape is compiled for itself, the largest batch so far alone: smaller ones end an epoch. Modules with hooks
    stay eager; an engine gathers their weights.
    """
    below = torch.compile(family.below, dynamic=False)
    above = torch.compile(family.above, dynamic=False)
    largest = 0

    def forward(model: nn.Module, images: Any, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal largest
        is_plain = isinstance(images, Tensor) and not (args or kwargs or family.recomputes(model))
        trains = model.training and torch.is_grad_enabled()
        if trains and is_plain:
            largest = max(largest, len(images))
        is_compiled = trains and is_plain and len(images) == largest
        if not is_compiled or _is_hooked(model, family) or cannot_compile():
            result: Tensor = type(model).forward(model, images, *args, **kwargs)
            return result
        with scaled(images) as images:
            x, beside = below(model, images)
        for index, block in enumerate(family.blocks(model)):
            x = block(x, **family.arguments(beside, index))
        return above(model, x)

    set_outside_copies(model, {"forward": MethodType(forward, model)})


def _is_hooked(model: nn.Module, family: BlockFamily) -> bool:
    with_blocks = family.blocks_path.partition(".")[0]
    outside = (child for name, child in model.named_children() if name != with_blocks)
    return any(
        part._forward_hooks or part._forward_pre_hooks for child in outside for part in child.modules()
    )
