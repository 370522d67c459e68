"""Data sets as a configuration describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2ft_hpc.config import DataConfig
from d2ft_hpc.data.datasets import LabelledImages, Split, open_split


def open_images(
    name: Any, *, split: Split, root: Path | None = None, classes: Any = None, **options: Any
) -> LabelledImages:
    """options: of `data` in the configuration, and `mean` and `std`."""
    statistics = {key: options.pop(key) for key in ("mean", "std") if key in options}
    path, kept = None if root is None else str(root), None if classes is None else list(classes)
    config = DataConfig(name=name, root=path, classes=kept, micro_batch_size=1, slots=1, **options)
    return open_split(config, split, **statistics)
