"""The selection that settings ask for, and what its scoring costs."""

from __future__ import annotations

import torch
from torch import nn

from d2ft_hpc.families.table import family_of
from d2ft_hpc.metering import meter
from d2ft_hpc.planning.samples import SampleOptions
from d2ft_hpc.selection.batch import blank
from d2ft_hpc.selection.scorer import SampleScorer
from d2ft_hpc.selection.select import SampleSelection


def selection_of(
    config: SampleOptions,
    model: nn.Module,
    sample_shape: tuple[int, ...],
    *,
    seed: int,
    replica: int,
    autocast_dtype: torch.dtype | None = None,
    cuda_graphs: bool = False,
) -> SampleSelection:
    """Makes what scores and draws a replica's samples. sample_shape: of those that are trained on, (channel, height,
    width) or (token,)."""
    family, image_size = family_of(model), config.image_size
    if family.takes_images and image_size is None:
        patch_size = family.patch_size(model)[0]
        image_size = -(-sample_shape[-1] // (2 * patch_size)) * patch_size
    scorer = SampleScorer(model, image_size, score=config.score, autocast_dtype=autocast_dtype)
    return SampleSelection(scorer, config, seed=seed, replica=replica, cuda_graphs=cuda_graphs)


def count_scoring(selection: SampleSelection, sample_shape: tuple[int, ...], device: torch.device) -> float:
    """This rank's FLOPs for the score of one sample of this shape; on all ranks together where they share the
    model."""
    with meter() as metered:
        selection.scorer.of_batch([blank(sample_shape, device)])
    return metered.flops
