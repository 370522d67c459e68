"""A score for every sample from a forward pass of the model itself on less of it: an image at a lower resolution, or a
part of a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ft_hpc.engines.engine import Inputs, logits_of
from d2ft_hpc.errors import ConfigError, PlanError
from d2ft_hpc.execution.image_scaling import scaled
from d2ft_hpc.families.family import NO_TARGET
from d2ft_hpc.families.table import family_of
from d2ft_hpc.selection.batch import Batch

SampleScore = Literal["error", "loss"]

LogitsOf = Callable[[Sequence[Any]], list[Tensor]]
"""In evaluation mode, of each micro-batch: logits [sample, class] of images of any size, or [sample, token, word] of
text by name."""


class SampleScorer:
    """Scores samples by how wrong the model is on their images at `image_size` pixels, or on a part of their text.

    image_size: None for models that read text. score: "error" is the Euclidean norm of softmax - target, which bounds
        the norm of a sample's gradient up to a factor common to all samples (Katharopoulos and Fleuret, arXiv
        1803.00942, section 3.3); "loss" is the cross entropy. Of a text it is the mean over the tokens that the part
        is to give. At half the resolution, or on a quarter of the tokens, the pass costs about a twelfth of a training
        step.

    Drop-outs are off; the model's parameters and mode stay as they are. Raises ConfigError if the size does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        image_size: int | None,
        *,
        score: SampleScore = "error",
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self._family = family = family_of(model)
        if image_size is not None:
            patch_size = family.patch_size(model)[0]
            if image_size < patch_size or image_size % patch_size:
                raise ConfigError(
                    f"options.image_size={image_size}: must be a multiple of the model's patches of {patch_size} "
                    f"pixels; nearest: {max(patch_size, round(image_size / patch_size) * patch_size)}"
                )
        self._image_size, self._score, self._autocast_dtype = image_size, score, autocast_dtype
        self._model = family.of_any_size(model)
        self._logits_of: LogitsOf = self._own_logits
        self.num_classes = 0
        """The number of classes of the logits that were scored last; they may be those of a module around `model`."""

    def bind(self, logits_of: LogitsOf) -> None:
        """Scores by the logits of this function from now on, such as an engine's whose ranks hold parts of the
        model."""
        self._logits_of = logits_of

    @torch.no_grad()
    def of_batch(self, micro_batches: Sequence[Batch]) -> Tensor:
        """float32 [sample] of all micro-batches. Labels of images: int64 [sample], or probabilities [sample, class]."""
        parts, targets = zip(*(self._part(each) for each in micro_batches), strict=True)
        logits = self._logits_of(parts)
        return torch.cat([self._scores(*each) for each in zip(logits, targets, strict=True)])

    def _part(self, batch: Batch) -> tuple[Inputs, Tensor]:
        """What of the samples is scored, and the targets of its logits."""
        if isinstance(batch, Mapping):
            return self._family.excerpt(batch)
        images, labels = batch
        assert self._image_size is not None
        return scaled(images, (self._image_size, self._image_size)), labels

    def _own_logits(self, parts: Sequence[Inputs]) -> list[Tensor]:
        training, mixed = self._model.training, self._autocast_dtype is not None
        self._model.eval()
        device = next(self._model.parameters()).device.type
        with torch.autocast(device, self._autocast_dtype, enabled=mixed, cache_enabled=False):
            logits = [logits_of(self._model, part) for part in parts]
        self._model.train(training)
        return logits

    def _scores(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self._image_size is None and logits.shape[:-1] != targets.shape:
            raise PlanError(
                f"planner='samples' scores texts by logits [sequence, token, word], but these of {[*targets.shape]} "
                f"tokens are {[*logits.shape]}: use a language model, or another planner, such as 'joint'"
            )
        self.num_classes = logits.shape[-1]
        return score_samples(logits.float(), targets, self._score)


def score_samples(logits: Tensor, targets: Tensor, score: SampleScore) -> Tensor:
    """float32 [sample] of logits float32 [sample, class] and targets int64 [sample] or probabilities [sample, class].

    Or of [sample, token, class] and int64 [sample, token]: the mean over the tokens that have a target, not NO_TARGET;
    0 where none has.
    """
    if logits.ndim == 3:
        counts = targets != NO_TARGET
        of_tokens = score_samples(logits.flatten(0, 1), targets.where(counts, 0).flatten(), score)
        return of_tokens.view_as(targets).where(counts, 0).sum(1) / counts.sum(1).clamp_min(1)
    if score == "loss":
        return F.cross_entropy(logits, targets, reduction="none")
    probabilities = logits.softmax(1)
    if targets.ndim == 1:
        of_target = targets[:, None]
        differences = probabilities.scatter_(1, of_target, probabilities.gather(1, of_target) - 1)
    else:
        differences = probabilities - targets
    error: Tensor = torch.linalg.vector_norm(differences, dim=1)
    return error
