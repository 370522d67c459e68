"""Images at another resolution than the loader gives them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def scaled(images: Tensor, size: tuple[int, int]) -> Tensor:
    """images: [sample, channel, height, width]; returns them as [sample, channel, *size] in their own type.

    Bilinear, over all pixels that a new one covers (antialiasing).
    """
    if tuple(images.shape[-2:]) == size:
        return images
    # A CPU has no such kernel for half precision.
    return F.interpolate(images.float(), size, mode="bilinear", antialias=True).to(images.dtype)
