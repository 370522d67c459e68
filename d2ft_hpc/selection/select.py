"""Turns the batch that a replica loaded into the smaller one that it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2ft_hpc.engines.engine import MicroBatch
from d2ft_hpc.execution.cuda_graph import CudaGraphs
from d2ft_hpc.selection.draw import draw_by_score
from d2ft_hpc.selection.scorer import SampleScorer

SampleWeights = Literal["none", "unbiased"]


class SampleSelection:
    """Scores a replica's batch and draws the samples that train: equally many from batches of equal size.

    weights: "unbiased" weighs a drawn sample by the inverse of its probability, so that the expected gradient is the
        whole batch's; "none" keeps the bias towards samples that the model gets wrong.
    seed: with the step and the replica it decides the draw, so that a resumed run draws the same.
    cuda_graphs: whether scoring and drawing are launched as one CUDA graph.
    """

    def __init__(
        self,
        scorer: SampleScorer,
        *,
        uniform_share: float,
        weights: SampleWeights,
        seed: int,
        replica: int,
        cuda_graphs: bool = False,
    ) -> None:
        self.scorer = scorer
        self._uniform_share, self._weights = uniform_share, weights
        self._seed, self._replica = seed, replica
        self._graphs: dict[int, CudaGraphs[MicroBatch]] | None = {} if cuda_graphs else None
        """By how many samples are drawn."""

    def __call__(self, micro_batches: Sequence[MicroBatch], step: int, share: float) -> list[MicroBatch]:
        """As many micro-batches as given, of equal size, with `share` of the samples (at least one each).

        They stay on their device, which is not synchronised, in memory that the next call may overwrite.

        With weights, the labels become float32 [sample, class], each row times its weight: the cross entropy of
        such a row is the weighted one.
        """
        slots, samples = len(micro_batches), sum(len(labels) for _, labels in micro_batches)
        per_slot = max(int(share * samples / slots + 1e-9), 1)
        count = per_slot * slots
        uniforms = self._uniforms(step, samples, micro_batches[0][0].device)
        arguments = (uniforms, *(tensor for pair in micro_batches for tensor in pair))
        choose = partial(self._choose, count)
        if self._graphs is not None:
            chosen = self._graphs.setdefault(count, CudaGraphs())(choose, *arguments)
        else:
            chosen = choose(*arguments)
        return list(zip(*(part.split(per_slot) for part in chosen), strict=True))

    def _choose(self, count: int, uniforms: Tensor, *tensors: Tensor) -> MicroBatch:
        """tensors: images and labels of each micro-batch in turn."""
        scores = self.scorer.of_batch(list(zip(tensors[::2], tensors[1::2], strict=True)))
        images, labels = _joined(tensors[::2]), _joined(tensors[1::2])
        drawn, probabilities = draw_by_score(
            scores, count, uniform_share=self._uniform_share, uniforms=uniforms
        )
        targets = labels[drawn]
        if self._weights == "unbiased":
            targets = self._weighted(targets, count / (len(images) * probabilities))
        return images[drawn], targets

    def _uniforms(self, step: int, samples: int, device: torch.device) -> Tensor:
        """The random numbers that decide the draw of a step, float64 [sample + 1] in [0, 1); the device is not
        synchronised."""
        numbers = torch.from_numpy(
            np.random.default_rng((self._seed, step, self._replica)).random(samples + 1)
        )
        return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers

    def _weighted(self, labels: Tensor, weights: Tensor) -> Tensor:
        if labels.ndim == 1:
            labels = F.one_hot(labels, self.scorer.num_classes)
        return (labels * weights[:, None]).float()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
