"""A layer norm over the channels of all heads that run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
    own = [axis.owned(of_part) for of_part in heads]
    wide = [part.to(dtype) for part in parts]
    count = torch.stack([mask.sum() for mask in own]).sum()
    mean = torch.stack([part.sum(-1, keepdim=True) for part in wide]).sum(0) / count
    centred = [(part - mean) * mask for part, mask in zip(wide, own, strict=True)]
    variance = torch.stack([part.square().sum(-1, keepdim=True) for part in centred]).sum(0) / count
    scale = torch.rsqrt(variance + norm.eps)
    return [
        (part * scale * head_part(axis, norm.weight, of_part) + head_part(axis, norm.bias, of_part)).to(
            given.dtype
        )
        for part, of_part, given in zip(centred, heads, parts, strict=True)
    ]
