"""Passes over a model that leave no trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn


@contextmanager
def probe(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode for every module inside; afterwards modes and random states are as before.

    Inside, timm recomputes no block: hooks would see its layers twice.
    """
    recomputes = getattr(model, "grad_checkpointing", False)
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
        try:
            model.train(training)
            if recomputes:
                cast(Any, model).set_grad_checkpointing(False)
            yield
        finally:
            if recomputes:
                cast(Any, model).set_grad_checkpointing(True)
            for module, was_training in modes:
                module.training = was_training
