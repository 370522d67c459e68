"""TensorBoard's files of a run, for those who watch it there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_hpc.errors import ConfigError
from d2ft_hpc.extras import cannot_import
from d2ft_hpc.training.evaluate import Evaluation


class TensorBoard:
    """Writes the scalars of a run below `folder`. Raises ConfigError if tensorboard is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            told = cannot_import(error, "tensorboard", "tensorboard")
            raise ConfigError(f"results.tensorboard=true: {told}") from None
        self._writer: Any = SummaryWriter(str(folder))

    def step(self, row: Mapping[str, Any]) -> None:
        """A row of the results' steps."""
        step = int(row["step"])
        for name in ("loss", "learning_rate", "gradient_norm"):
            self._writer.add_scalar(f"train/{name}", row[name], step)
        dense = np.nansum(row["dense_flops"])
        for name in ("planned", "executed"):
            self._writer.add_scalar(f"compute/{name}_share", np.nansum(row[f"{name}_flops"]) / dense, step)
        for name in ("step", "data", "communication", "waiting"):
            self._writer.add_scalar(f"seconds/{name}", np.nanmax(row[f"{name}_seconds"]), step)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """An evaluation after `step` steps."""
        self._writer.add_scalar("evaluation/accuracy", evaluation.accuracy, step)
        self._writer.add_scalar("evaluation/loss", evaluation.loss, step)

    def close(self) -> None:
        """Everything is in the files."""
        self._writer.close()
