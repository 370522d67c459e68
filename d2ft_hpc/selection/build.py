"""The selection that settings ask for, and what its scoring costs."""

from __future__ import annotations

import torch
from torch import nn

from d2ft_hpc.families.table import family_of
from d2ft_hpc.metering import meter
from d2ft_hpc.planning.samples import SampleOptions
from d2ft_hpc.selection.scorer import SampleScorer
from d2ft_hpc.selection.select import SampleSelection


def selection_of(
    config: SampleOptions,
    model: nn.Module,
    image_size: int,
    *,
    seed: int,
    replica: int,
    autocast_dtype: torch.dtype | None = None,
    cuda_graphs: bool = False,
) -> SampleSelection:
    """Makes what scores and draws a replica's samples. image_size: pixels, of the images that are trained on."""
    patch_size = family_of(model).patch_size(model)[0]
    half = -(-image_size // (2 * patch_size)) * patch_size
    scorer = SampleScorer(
        model,
        config.image_size or half,
        score=config.score,
        autocast_dtype=autocast_dtype,
    )
    return SampleSelection(
        scorer,
        uniform_share=config.uniform_share,
        weights=config.weights,
        seed=seed,
        replica=replica,
        cuda_graphs=cuda_graphs,
    )


def count_scoring(selection: SampleSelection, image_size: int, device: torch.device) -> float:
    """This rank's FLOPs for one sample's score; on all ranks together where they share the model."""
    image = torch.zeros(1, 3, image_size, image_size, device=device)
    with meter() as metered:
        selection.scorer.of_batch([(image, torch.zeros(1, device=device, dtype=torch.long))])
    return metered.flops
