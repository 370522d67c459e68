"""Samples drawn by score: the draw, the scores and the batch that results."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from d2ft_hpc.errors import ConfigError, PlanError
from d2ft_hpc.planning import Operation, plan_samples
from d2ft_hpc.planning.samples import SampleOptions
from d2ft_hpc.selection import SampleScorer, SampleSelection, draw_by_score
from d2ft_hpc.selection.draw import inclusion_probabilities
from tests.models import tiny_vit


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniforms(samples: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(samples + 1, dtype=torch.float64, generator=generator(seed))


@pytest.mark.parametrize(
    "scores",
    [
        torch.rand(40, generator=generator()),
        torch.tensor([1e6] * 3 + [1e-6] * 37),
        torch.zeros(40),
        torch.tensor([float("nan"), float("inf")] + [1.0] * 38),
    ],
    ids=["random", "skewed", "zero", "not finite"],
)
@pytest.mark.parametrize("count", [1, 17, 39, 40])
def test_the_draw_has_the_asked_number_of_different_samples(scores: torch.Tensor, count: int) -> None:
    probabilities = inclusion_probabilities(scores, count, 0.25)
    assert probabilities.sum().item() == pytest.approx(count)
    assert probabilities.min() > 0
    assert probabilities.max() <= 1
    for seed in range(20):
        drawn, of_drawn = draw_by_score(scores, count, uniform_share=0.25, uniforms=uniforms(40, seed))
        assert len(set(drawn.tolist())) == count
        torch.testing.assert_close(of_drawn, probabilities[drawn])


def test_samples_are_drawn_as_often_as_their_probability_says() -> None:
    scores = torch.rand(30, generator=generator()) ** 3
    drawn = torch.zeros(30)
    draws = 1500
    for seed in range(draws):
        drawn[draw_by_score(scores, 12, uniform_share=0.1, uniforms=uniforms(30, seed))[0]] += 1
    expected = inclusion_probabilities(scores, 12, 0.1)
    worst = (
        (drawn / draws - expected).abs() / (expected * (1 - expected) / draws).clamp_min(1e-9).sqrt()
    ).max()
    assert worst < 4.5  # standard errors, over 30 samples
    order = scores.argsort()
    assert (expected[order].diff() >= 0).all(), "a higher score must not be drawn less often"


def test_no_score_beats_a_share_for_all() -> None:
    scores = torch.tensor([100.0] + [0.0] * 9)
    assert inclusion_probabilities(scores, 5, 0.25).min() > 0.4
    with pytest.raises(ValueError, match="11 of 10"):
        draw_by_score(scores, 11, uniform_share=0.25, uniforms=uniforms(10))


def images_of(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 3, size, size, generator=generator()), torch.arange(count) % 5


def test_a_full_size_score_is_the_models_own_error() -> None:
    model = tiny_vit()
    images, labels = images_of(6, model.patch_embed.img_size[0])
    model.train()
    with torch.no_grad():
        logits = model.eval()(images)
    model.train()
    error = (logits.softmax(1) - F.one_hot(labels, model.num_classes)).norm(dim=1)
    torch.testing.assert_close(SampleScorer(model, images.shape[-1]).of_batch([(images, labels)]), error)
    loss = SampleScorer(model, images.shape[-1], score="loss").of_batch([(images, labels)])
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="none"))
    assert model.training


def test_a_half_size_score_is_that_of_timms_model_of_any_size() -> None:
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "num_classes": 5}
    model = timm.models.VisionTransformer(img_size=32, **options)
    reference = timm.models.VisionTransformer(img_size=32, dynamic_img_size=True, **options).eval()
    reference.load_state_dict(model.state_dict())
    images, labels = images_of(6, 32)
    small = F.interpolate(images, 16, mode="bilinear", antialias=True)
    with torch.no_grad():
        error = (reference(small).softmax(1) - F.one_hot(labels, 5)).norm(dim=1)
    torch.testing.assert_close(SampleScorer(model, 16).of_batch([(images, labels)]), error)
    with torch.no_grad():
        assert model(images).shape == (6, 5), "the model itself still takes its own size"
    with pytest.raises(ConfigError, match=r"options.image_size=20: .* nearest: 16"):
        SampleScorer(model, 20)


def selection(model: torch.nn.Module, weights: str, seed: int = 0) -> SampleSelection:
    scorer = SampleScorer(model, model.patch_embed.img_size[0])
    return SampleSelection(scorer, SampleOptions(weights=weights), seed=seed, replica=0)


def test_the_chosen_batch_keeps_images_with_their_labels_and_repeats_itself() -> None:
    model = tiny_vit()
    images, labels = images_of(20, model.patch_embed.img_size[0])
    batch = list(zip(images.split(5), labels.split(5), strict=True))
    chosen = selection(model, "none")(batch, step=3, share=0.45)
    assert [len(part) for part, _ in chosen] == [2, 2, 2, 2]
    for part, targets in chosen:
        for image, label in zip(part, targets, strict=True):
            (place,) = torch.nonzero((images == image).all(dim=(1, 2, 3)))
            assert labels[place] == label
    again = selection(model, "none")(batch, step=3, share=0.45)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(chosen, again, strict=True))
    other_step = selection(model, "none")(batch, step=4, share=0.45)
    assert not all(torch.equal(one[0], other[0]) for one, other in zip(chosen, other_step, strict=True))


def test_unbiased_weights_give_the_whole_batchs_gradient_on_average() -> None:
    model = tiny_vit()
    images, labels = images_of(10, model.patch_embed.img_size[0])
    weight = model.head.weight

    def gradient(part: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(F.cross_entropy(model.eval()(part), targets), weight)
        return found

    whole = gradient(images, labels)
    draws = torch.stack(
        [gradient(*selection(model, "unbiased", seed)([(images, labels)], 0, 0.5)[0]) for seed in range(200)]
    )
    error = (draws.mean(0) - whole).norm() / draws.std(0).norm() * len(draws) ** 0.5
    assert error < 1.5  # of the mean, in its own standard errors


@pytest.mark.parametrize("budget", [0.25, 0.4, 0.6, 1.0])
def test_a_sample_plan_is_the_largest_within_its_budget(budget: float) -> None:
    sizes = {"samples": 40, "slots": 5, "replicas": 2, "num_blocks": 3, "num_heads": 2}
    plan = plan_samples(**sizes, compute_budget=budget, score_cost=0.08)
    assert plan.binding == "sample"
    assert plan.operations.shape == (80, 3, 2)
    for replica in range(2):
        full = (plan.for_replica(replica) == Operation.FULL).all(axis=(1, 2))
        assert (full == (np.arange(40) < full.sum())).all(), "the first samples in the draw's order run"
        assert full.sum() % 5 == 0
        assert full.mean() + 0.08 <= budget + 1e-9 < (full.sum() + 5) / 40 + 0.08
    assert type(plan).from_bytes(plan.to_bytes()) == plan


def test_a_budget_below_one_sample_a_micro_batch_names_the_least() -> None:
    with pytest.raises(PlanError, match=r"^compute_budget=0.1: .* at least 0.205"):
        plan_samples(
            samples=40, slots=5, replicas=1, num_blocks=1, num_heads=1, compute_budget=0.1, score_cost=0.08
        )
