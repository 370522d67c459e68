"""The samples that a model was made for."""

from __future__ import annotations

from torch import nn

from d2ft_hpc.errors import ConfigError
from d2ft_hpc.families.table import family_of


def sample_shape_of(model: nn.Module) -> tuple[int, ...]:
    """(channel, height, width) of images, (token,) of text. Raises ConfigError where the model does not say."""
    shape = family_of(model).sample_shape(model)
    if shape is None:
        raise ConfigError("the model has no image size: make it with img_size=, so that costs can be counted")
    return shape
