"""Ends a run that diverges. Losses and weights are checked where they are read anyway, so that no step waits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from d2ft_hpc.config import RunConfig
from d2ft_hpc.errors import DivergedError
from d2ft_hpc.training import run_folder
from d2ft_hpc.training.checkpoint import checkpoint_name, complete_checkpoints


def require_finite(weights: Mapping[str, Tensor]) -> None:
    """Raises DivergedError with the name of the first weight that has a value which is not finite."""
    bad = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise DivergedError(f"{len(bad)} of {len(weights)} weights are not finite, the first is {bad[0]}")


@contextmanager
def with_advice(config: RunConfig) -> Iterator[None]:
    """Adds to a DivergedError what the user can do."""
    try:
        yield
    except DivergedError as error:
        good = complete_checkpoints(config.run_folder / run_folder.CHECKPOINTS)
        if error.steps_done is not None:  # its loss was computed from the state after those steps
            good = [checkpoint for checkpoint in good if checkpoint.name < checkpoint_name(error.steps_done)]
        from_where = (
            f"the last good state is {good[-1]}, whose model.safetensors a new run can take as model.weights"
            if good
            else "no checkpoint is from before that"
        )
        raise DivergedError(
            f"{error}: lower optimizer.learning_rate ({config.optimizer.learning_rate:g}), warm up longer or set "
            f"engine.gradient_clipping; {from_where}"
        ) from error.__cause__
