"""Tells a loop when its model runs and when an optimiser steps, without a change to either."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.gradients import in_backward
from d2ft_hpc.execution.optimizer_steps import call_around_steps

Call = Callable[[Sequence[Any]], None]


class ModelHook:
    """A hook of one module alone, for `register_forward_pre_hook` and `register_forward_hook` with keywords: the
    module's copies and pickles get hooks that do nothing."""

    def __init__(self, hooked: nn.Module, model: nn.Module, training: Call, evaluation: Call) -> None:
        """hooked: what gets the hook. model: whose mode counts, since a frozen part may be left in evaluation mode.

        What to call with the forward's arguments, or as a hook after it with its output (None where it raised):
        training, in training mode with gradients; evaluation, else.
        """
        self._hooked, self._model = weakref.ref(hooked), weakref.ref(model)
        self._training = torch.compiler.disable(training)
        self._evaluation = torch.compiler.disable(evaluation)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        if getattr(module, "_is_replica", False) and not output:
            raise ConfigError(
                "the model runs in torch.nn.DataParallel, as a Trainer takes it where one process sees several GPUs: "
                "start the script by torchrun, one process for each GPU"
            )
        model = self._model()
        if module is not self._hooked() or model is None or in_backward():
            return  # a backward may run a model again (activation checkpointing)
        if model.training and torch.is_grad_enabled():
            self._training(output or [*args, kwargs])
        else:
            self._evaluation([])

    def __reduce__(self) -> Any:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any) -> None:
    pass


def watch_optimizers(
    model: nn.Module, owner: object, before: Callable[[bool], None], after: Callable[[Optimizer], None]
) -> None:
    """Calls two methods of `owner`, while it lives, around the steps of optimisers.

    before: before the step of any optimiser, with whether it has parameters of `model`. after: after the step of one
        that has some, with it.
    """
    kept = weakref.ref(model)
    methods = weakref.WeakMethod(before), weakref.WeakMethod(after)

    def has_own(optimizer: Optimizer) -> bool:
        model = kept()
        stepped = {id(each) for group in optimizer.param_groups for each in group["params"]}
        # The first one that is found ends the walk, which takes long for all of a model.
        return model is not None and any(id(parameter) in stepped for parameter in model.parameters())

    def before_step(optimizer: Optimizer) -> None:
        if (call := methods[0]()) is not None:
            call(has_own(optimizer))

    def after_step(optimizer: Optimizer) -> None:
        if (call := methods[1]()) is not None and has_own(optimizer):
            call(optimizer)

    call_around_steps(owner, before_step, after_step)
