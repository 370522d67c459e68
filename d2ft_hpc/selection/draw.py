"""Draws a fixed number of samples with probabilities that follow their scores."""

from __future__ import annotations

import torch
from torch import Tensor


def inclusion_probabilities(scores: Tensor, count: int, uniform_share: float) -> Tensor:
    """Probability of each sample to be among `count` drawn ones, float64 [sample], summing to `count`, at most 1.

    scores: [sample], not negative; a score that is not finite counts as the mean of the others.
    uniform_share: multiple of the mean score that is added to every score, so that no sample is left out for good
        and the draw does not follow errors of the score alone (VCAS, arXiv 2402.17227, section 4.2, mixes likewise).

    Runs on the scores' device without synchronising it.
    """
    scores = scores.double()
    finite = torch.isfinite(scores)
    known = torch.where(finite, scores, 0.0)
    mean = known.sum() / finite.sum().clamp_min(1)
    mixed = torch.where(finite, known, mean) + uniform_share * mean
    mixed = torch.where(mixed.sum() > 0, mixed, torch.ones_like(mixed))
    # min(1, factor * score) sums to count for the factor that caps the k highest; k is the least that caps all it must.
    highest = mixed.sort(descending=True).values
    rest = highest.flip(0).cumsum(0).flip(0)  # rest[k]: of all but the k highest
    left = count - torch.arange(len(mixed), device=mixed.device)
    k = (left * highest <= rest).to(torch.uint8).argmax()
    probabilities: Tensor = (mixed * (left.take(k) / rest.take(k))).clamp_max(1)
    return probabilities


def draw_by_score(
    scores: Tensor, count: int, *, uniform_share: float, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Exactly `count` different samples, drawn systematically: one random offset, steps of equal probability.

    scores: [sample]. uniforms: float64 [sample + 1], random in [0, 1), on the scores' device; they decide the draw.
    Returns indices int64 [count] and the inclusion probability of each drawn sample, float64 [count]. Systematic
    sampling keeps the number fixed (shapes never change) and its variance is below that of independent draws (Madow,
    1949). Runs without synchronising the device.

    Raises ValueError if `count` is not between 1 and the number of samples.
    """
    if not 1 <= count <= len(scores):
        raise ValueError(f"{count} of {len(scores)} samples cannot be drawn")
    probabilities = inclusion_probabilities(scores, count, uniform_share)
    # Indexing with a scalar tensor and randperm would wait for a GPU; take and argsort do not.
    order = uniforms[:-1].argsort()
    upper = torch.cumsum(probabilities[order], 0)
    upper = upper * (count / upper[-1])
    points = torch.arange(count, device=scores.device) + uniforms[-1]
    places = torch.searchsorted(upper, points, right=True).clamp_max(len(scores) - 1)
    drawn = order[places]
    return drawn, probabilities[drawn]
