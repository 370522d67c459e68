"""Cuts a model into pipeline stages, each with a block or more, so that the dense model's slowest stage is as fast as
possible."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from d2ft_hpc.errors import ConfigError
from d2ft_hpc.families.table import family_of
from d2ft_hpc.metering import StepCosts, meter
from d2ft_hpc.model.probe import probe
from d2ft_hpc.model.subnets import ParameterClass, SubnetMap


def layer_flops(model: nn.Module, costs: StepCosts, sample_shape: tuple[int, ...]) -> list[float]:
    """Training FLOPs of one sample in the dense model: below the blocks, of each block, and above them.

    sample_shape: such as (channel, height, width). costs: of the whole model. Where the family does not know what lies
    below from what lies above, ranks cannot hold parts, and all of it counts as above.
    """
    below = _flops_below(model, sample_shape) if family_of(model).is_composed else 0.0
    return [below, *costs.block_flops.tolist(), costs.outside_flops - below]


def _flops_below(model: nn.Module, sample_shape: tuple[int, ...]) -> float:
    subnets = SubnetMap.of(model)
    trained = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and subnets.classify(name) is ParameterClass.EMBEDDING
    ]
    image = subnets.family.blank(model, sample_shape)
    with probe(model, training=True), meter() as metered:
        tokens, _ = subnets.family.below(model, image)
        if trained:
            torch.autograd.grad(tokens.sum(), trained, allow_unused=True)
    return float(metered.flops)


def cut_stages(flops: list[float], stages: int) -> list[range]:
    """The blocks of each stage, cut so that the most expensive stage costs as little as possible.

    flops: of what lies below the blocks, of each block, and of what lies above (`layer_flops`).
    Raises ConfigError if there are more stages than blocks.
    """
    below, *of_blocks, above = flops
    blocks = len(of_blocks)
    if stages > blocks:
        raise ConfigError(
            f"{stages} pipeline stages: the model has only {blocks} blocks, and each stage needs one; use at most "
            f"{blocks} stages"
        )
    edges = np.concatenate([[0.0], np.cumsum(of_blocks)])
    edges[1:] += below
    edges[-1] += above
    # When s stages share the first b blocks: slowest[s, b], least cost of the slowest; cut[s, b], start of the last.
    slowest = np.full((stages + 1, blocks + 1), np.inf)
    cut = np.zeros((stages + 1, blocks + 1), dtype=int)
    slowest[0, 0] = 0.0
    for stage in range(1, stages + 1):
        for end in range(stage, blocks + 1):
            starts = np.arange(stage - 1, end)
            worst = np.maximum(slowest[stage - 1, starts], edges[end] - edges[starts])
            best = int(worst.argmin())
            slowest[stage, end], cut[stage, end] = worst[best], starts[best]
    ranges: list[range] = []
    end = blocks
    for stage in range(stages, 0, -1):
        ranges.insert(0, range(cut[stage, end], end))
        end = int(cut[stage, end])
    return ranges


def stage_shares(flops: list[float], stages: list[range]) -> list[float]:
    """Each stage's share of the dense training FLOPs."""
    sums = [sum(flops[1 + block] for block in blocks) for blocks in stages]
    sums[0] += flops[0]
    sums[-1] += flops[-1]
    return [part / sum(sums) for part in sums]


def describe_stages(flops: list[float], stages: list[range]) -> str:
    """One line: each stage's blocks and its share of the dense training FLOPs."""
    parts = [
        f"blocks {blocks.start}-{blocks.stop - 1} {share:.1%}"
        for blocks, share in zip(stages, stage_shares(flops, stages), strict=True)
    ]
    return f"pipeline stages (share of the dense FLOPs): {'; '.join(parts)}"
