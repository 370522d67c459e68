"""A layer norm over the channels of all heads that run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.families.head_linear import head_part


def norm_axes(name: str, heads: int, channels: int) -> dict[str, HeadAxis]:
    """How weight and bias of such a norm split by head, by their names in the block; name: the norm's."""
    axis = HeadAxis.of_units((), heads, channels, splits_rows=True)
    return {f"{name}.weight": axis, f"{name}.bias": axis}


def normalise_heads(
    norm: nn.LayerNorm,
    name: str,
    axes: Mapping[str, HeadAxis],
    parts: Sequence[Tensor],
    heads: Sequence[Tensor],
) -> list[Tensor]:
    """Mean and variance are those of all parts' channels together; weight and bias are each channel's own.

    name: of the norm in its block, by which `axes` has how its weight and bias split by head. parts: [..., own
    channels] each, with zeros for channels that no head owns, and the heads, int64 [n]. Computed in float32 at least,
    as torch's norm under autocast.
    """
    of_weight, of_bias = axes[f"{name}.weight"], axes[f"{name}.bias"]
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    wide = [part.to(dtype) for part in parts]
    count = _total([of_weight.count(of_part) for of_part in heads])
    mean = _total([part.sum(-1, keepdim=True) for part in wide]) / count
    centred = [part - mean for part in wide]
    unowned = sum(part.shape[-1] for part in parts) - count  # whose zeros are now -mean
    squares = _total([part.square().sum(-1, keepdim=True) for part in centred]) - unowned * mean.square()
    scale = torch.rsqrt((squares / count).clamp(min=0) + norm.eps)
    return [
        (
            part * scale * _filled(head_part(of_weight, norm.weight, of_part), part)
            + _filled(head_part(of_bias, norm.bias, of_part), part)
        ).to(given.dtype)
        for part, of_part, given in zip(centred, heads, parts, strict=True)
    ]


def _total(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for each in tensors[1:]:
        total = total + each
    return total


def _filled(channels: Tensor, part: Tensor) -> Tensor:
    """With zeros for the channels beyond those of the heads, where `part` has such."""
    missing = part.shape[-1] - channels.shape[0]
    return F.pad(channels, (0, missing)) if missing else channels
