"""A layer norm over the channels of all heads that run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.families.head_linear import head_part


def normalise_heads(
    norm: nn.LayerNorm, axis: HeadAxis, parts: Sequence[Tensor], heads: Sequence[Tensor]
) -> list[Tensor]:
    """Mean and variance are those of all parts' channels together; weight and bias are each channel's own. axis: how
    the norm's weight splits by head. parts: [..., own channels] each, with its heads, int64 [n]. Computed in float32
    at least, as torch's norm under autocast.
    """
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    own = [_filled(axis.owned(of_part), part) for part, of_part in zip(parts, heads, strict=True)]
    wide = [part.to(dtype) for part in parts]
    count = torch.stack([mask.sum() for mask in own]).sum()
    mean = torch.stack([part.sum(-1, keepdim=True) for part in wide]).sum(0) / count
    centred = [(part - mean) * mask for part, mask in zip(wide, own, strict=True)]
    variance = torch.stack([part.square().sum(-1, keepdim=True) for part in centred]).sum(0) / count
    scale = torch.rsqrt(variance + norm.eps)
    return [
        (
            part * scale * _filled(head_part(axis, norm.weight, of_part), part)
            + _filled(head_part(axis, norm.bias, of_part), part)
        ).to(given.dtype)
        for part, of_part, given in zip(centred, heads, parts, strict=True)
    ]


def _filled(channels: Tensor, part: Tensor) -> Tensor:
    """With zeros for the channels beyond those of the heads, where `part` has such."""
    return F.pad(channels, (0, part.shape[-1] - channels.shape[0]))
