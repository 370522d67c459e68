"""A score for every sample from a forward pass of the model itself at a lower resolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.resize import scaled
from d2ft_hpc.families.table import family_of

SampleScore = Literal["error", "loss"]

LogitsOf = Callable[[Sequence[Tensor]], list[Tensor]]
"""Logits [sample, class] of each micro-batch's images, of any size, in evaluation mode."""


class SampleScorer:
    """Scores samples by how wrong the model is on their images at `image_size` pixels.

    score: "error" is the Euclidean norm of softmax - target, which bounds the norm of a sample's gradient up to a
        factor common to all samples (Katharopoulos and Fleuret, arXiv 1803.00942, section 3.3); "loss" is the cross
        entropy. At half the resolution the pass costs about a twelfth of a training step.

    Drop-outs are off; the model's parameters and mode stay as they are. Raises ConfigError if the size does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        image_size: int,
        *,
        score: SampleScore = "error",
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        family = family_of(model)
        patch_size = family.patch_size(model)[0]
        if image_size < patch_size or image_size % patch_size:
            raise ConfigError(
                f"options.image_size={image_size}: must be a multiple of the model's patches of {patch_size} "
                f"pixels; nearest: {max(patch_size, round(image_size / patch_size) * patch_size)}"
            )
        self._image_size, self._score, self._autocast_dtype = image_size, score, autocast_dtype
        self._model = family.of_any_size(model)
        self._logits_of: LogitsOf | None = None
        self.num_classes = 0
        """The number of classes of the logits that were scored last; they may be those of a module around `model`."""

    def bind(self, logits_of: LogitsOf) -> None:
        """Scores by the logits of this function from now on, such as an engine's whose ranks hold parts of the
        model."""
        self._logits_of = logits_of

    @torch.no_grad()
    def of_batch(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """float32 [sample] of all micro-batches, which are as `__call__` takes them."""
        if self._logits_of is None:
            return torch.cat([self(images, targets) for images, targets in micro_batches])
        logits = self._logits_of([self._resized(images) for images, _ in micro_batches])
        return torch.cat(
            [self._scores(part, targets) for part, (_, targets) in zip(logits, micro_batches, strict=True)]
        )

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """images: [sample, channel, height, width]; targets: int64 [sample] or probabilities [sample, class].

        Returns float32 [sample].
        """
        training = self._model.training
        self._model.eval()
        scores = self._forward(images, targets)
        self._model.train(training)
        return scores

    def _forward(self, images: Tensor, targets: Tensor) -> Tensor:
        images = self._resized(images)
        mixed = self._autocast_dtype is not None
        with torch.autocast(images.device.type, self._autocast_dtype, enabled=mixed, cache_enabled=False):
            logits = self._model(images)
        return self._scores(logits, targets)

    def _scores(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.num_classes = logits.shape[1]
        return score_samples(logits.float(), targets, self._score)

    def _resized(self, images: Tensor) -> Tensor:
        return scaled(images, (self._image_size, self._image_size))


def score_samples(logits: Tensor, targets: Tensor, score: SampleScore) -> Tensor:
    """float32 [sample] of logits float32 [sample, class] and targets as `SampleScorer` takes them."""
    if score == "loss":
        return F.cross_entropy(logits, targets, reduction="none")
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1])
    error: Tensor = torch.linalg.vector_norm(logits.softmax(1) - targets, dim=1)
    return error
