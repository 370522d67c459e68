"""Turns the batch that a replica loaded into the smaller one that it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2ft_hpc.execution.cuda_graph import CudaGraphs
from d2ft_hpc.planning.samples import SampleOptions
from d2ft_hpc.selection.batch import Batch, Kind, like, samples_of, tensors_of
from d2ft_hpc.selection.draw import draw_by_score
from d2ft_hpc.selection.scorer import SampleScorer


class SampleSelection:
    """Scores a replica's batch and draws the samples that train: equally many from batches of equal size.

    options.weights: "unbiased" weighs a drawn sample by the inverse of its probability, so that the expected gradient
        is the whole batch's; "none" keeps the bias towards samples that the model gets wrong.
    seed: with the step and the replica it decides the draw, so that a resumed run draws the same.
    cuda_graphs: whether scoring and drawing are launched as one CUDA graph.
    """

    def __init__(
        self,
        scorer: SampleScorer,
        options: SampleOptions,
        *,
        seed: int,
        replica: int,
        cuda_graphs: bool = False,
    ) -> None:
        self.scorer = scorer
        self._options, self._seed, self._replica = options, seed, replica
        self._graphs: dict[int, CudaGraphs[tuple[Tensor, ...]]] | None = {} if cuda_graphs else None
        """By how many samples are drawn."""

    def __call__(self, micro_batches: Sequence[Kind], step: int, share: float) -> list[Kind]:
        """As many micro-batches as given, of equal size, with `share` of the samples (at least one each) and all that
        belongs to them.

        They stay on their device, which is not synchronised, in memory that the next call may overwrite.

        With weights, the labels of images become float32 [sample, class], each row times its weight: the cross
        entropy of such a row is the weighted one.
        """
        first, slots = micro_batches[0], len(micro_batches)
        samples = sum(len(samples_of(each)) for each in micro_batches)
        per_slot = max(int(share * samples / slots + 1e-9), 1)
        count = per_slot * slots
        uniforms = self._uniforms(step, samples, samples_of(first).device)
        arguments = (uniforms, *(tensor for each in micro_batches for tensor in tensors_of(each)))
        choose = partial(self._choose, first, count)
        if self._graphs is not None:
            chosen = self._graphs.setdefault(count, CudaGraphs())(choose, *arguments)
        else:
            chosen = choose(*arguments)
        parts = zip(*(tensor.split(per_slot) for tensor in chosen), strict=True)
        return [like(first, part) for part in parts]

    def _choose(self, kind: Batch, count: int, uniforms: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """tensors: those of each micro-batch in turn, which is of the same kind as `kind`."""
        width = len(kind)
        scores = self.scorer.of_batch(
            [like(kind, tensors[start : start + width]) for start in range(0, len(tensors), width)]
        )
        drawn, probabilities = draw_by_score(
            scores, count, uniform_share=self._options.uniform_share, uniforms=uniforms
        )
        *others, last = (_joined(tensors[place::width])[drawn] for place in range(width))
        if self._options.weights == "unbiased":
            last = self._weighted(last, count / (len(scores) * probabilities))
        return *others, last

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
