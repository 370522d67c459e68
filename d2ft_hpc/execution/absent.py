"""Absent gradients count as zero in users' own loops too, under plain torch, DDP and FSDP2."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from d2ft_hpc.execution.optimizer_steps import call_around_steps


def fill_absent_gradients(model: nn.Module, is_needed: Callable[[nn.Module], bool]) -> None:
    """From now on, before any optimiser's step, a trained parameter of `model` without a gradient gets a zero one.

    Moments and weight decay then go on for what a plan did not run, and every parameter has a state in a checkpoint.
    This is a hook of torch's, because the optimiser belongs to the loop; it ends with the model. An optimiser whose
    parameters all lack gradients steps as torch does.

    is_needed: whether a plan is in force.
    """
    kept = weakref.ref(model)

    def fill(optimizer: Optimizer) -> None:
        model = kept()
        if model is None or not is_needed(model):
            return
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        absent = [parameter for parameter in stepped if parameter.grad is None and parameter.requires_grad]
        if not absent or all(parameter.grad is None for parameter in stepped):
            return
        own = {id(parameter) for parameter in model.parameters()}
        for parameter in absent:
            if id(parameter) in own:
                parameter.grad = torch.zeros_like(parameter)

    call_around_steps(model, fill)
