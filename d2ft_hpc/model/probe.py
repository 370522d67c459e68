"""Passes over a model that leave no trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from d2ft_hpc.families.table import family_of, find_backbone


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the mode of each module is as before."""
    with _in_mode(model, training=False), torch.no_grad():
        yield


@contextmanager
def probe(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode for every module inside; afterwards modes and random states are as before.

    Inside, no block is recomputed, since hooks would see its layers twice.
    """
    backbone = find_backbone(model)
    once = nullcontext() if backbone is None else family_of(backbone).not_recomputing(backbone)
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.enable_grad(), once, _in_mode(model, training):
        yield


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
