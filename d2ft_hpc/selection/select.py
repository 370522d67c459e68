"""Turns the batch that a replica loaded into the smaller one that it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2ft_hpc.engines.engine import MicroBatch
from d2ft_hpc.selection.draw import draw_by_score
from d2ft_hpc.selection.scorer import SampleScorer

SampleWeights = Literal["none", "unbiased"]


class SampleSelection:
    """Scores a replica's batch and draws the samples that train: the same number from each batch of a size.

    weights: "unbiased" weighs a drawn sample by the inverse of its probability, so that the expected gradient is the
        whole batch's; "none" keeps the bias towards samples that the model gets wrong.
    seed: with the step and the replica it decides the draw, so that a resumed run draws the same.
    """

    def __init__(
        self,
        scorer: SampleScorer,
        *,
        uniform_share: float,
        weights: SampleWeights,
        seed: int,
        replica: int,
    ) -> None:
        self.scorer = scorer
        self._uniform_share, self._weights = uniform_share, weights
        self._seed, self._replica = seed, replica

    def __call__(self, micro_batches: Sequence[MicroBatch], step: int, share: float) -> list[MicroBatch]:
        """As many micro-batches as given, of equal size, with `share` of the samples (at least one each).

        They stay on their device, which is not synchronised.

        With weights, the labels become float32 [sample, class], each row times its weight: the cross entropy of
        such a row is the weighted one.
        """
        scores = self.scorer.of_batch(micro_batches)
        images = torch.cat([images for images, _ in micro_batches])
        labels = torch.cat([labels for _, labels in micro_batches])
        slots = len(micro_batches)
        per_slot = max(int(share * len(images) / slots + 1e-9), 1)
        generator = torch.Generator(images.device)
        generator.manual_seed(self._seed_of(step))
        drawn, probabilities = draw_by_score(
            scores, per_slot * slots, uniform_share=self._uniform_share, generator=generator
        )
        targets = labels[drawn]
        if self._weights == "unbiased":
            targets = self._weighted(targets, per_slot * slots / (len(images) * probabilities))
        return list(zip(images[drawn].split(per_slot), targets.split(per_slot), strict=True))

    def _seed_of(self, step: int) -> int:
        state = np.random.SeedSequence((self._seed, step, self._replica)).generate_state(1, np.uint64)
        return int(state[0] >> np.uint64(1))

    def _weighted(self, labels: Tensor, weights: Tensor) -> Tensor:
        if labels.ndim == 1:
            labels = F.one_hot(labels, self.scorer.num_classes)
        return (labels * weights[:, None]).float()
