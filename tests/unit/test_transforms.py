"""Batch transforms against torchvision's own, seeded draws, mixing and the parts of a training set."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tf

from d2ft_hpc.data.loader import train_loader
from d2ft_hpc.data.mixing import Mixing
from d2ft_hpc.data.sampler import MicroBatchSampler
from d2ft_hpc.data.subsets import training_and_validation
from d2ft_hpc.data.transforms import DRAWS, BatchTransform, Cut, _box, timm_transform, uniform_draws
from d2ft_hpc.errors import ConfigError, DataError
from tests.splits import open_images

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)


def images(count: int = 5, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.manual_seed(0))


def draws(count: int = 5) -> torch.Tensor:
    return torch.from_numpy(np.stack([uniform_draws((1, i)) for i in range(count)]))


def normalised(x: torch.Tensor) -> torch.Tensor:
    return v2.Normalize(list(MEAN), list(STD))(x.float() / 255)


def test_resizing_is_torchvisions() -> None:
    got = BatchTransform(48, MEAN, STD)(images(), draws())
    expected = normalised(tf.resize(images().float(), [48, 48], antialias=True))
    torch.testing.assert_close(got, expected)
    halved = BatchTransform(16, MEAN, STD)(images(), draws())
    torch.testing.assert_close(halved, normalised(tf.resize(images().float(), [16, 16], antialias=True)))


def test_shift_and_flip_are_torchvisions_crop_of_the_mirrored_image() -> None:
    drawn = draws(40)
    got = BatchTransform(32, MEAN, STD, shift=True, flip=True)(images(40), drawn)
    padded = tf.pad(normalised(images(40)), [4, 4, 4, 4], padding_mode="reflect")
    offsets = set()
    for i in range(40):
        top, left = int(drawn[i, 0] * 9), int(drawn[i, 1] * 9)
        expected = tf.crop(padded[i], top, left, 32, 32)
        expected = expected.flip(-1) if drawn[i, 2] < 0.5 else expected
        torch.testing.assert_close(got[i], expected)
        offsets.add((top, left))
    assert len(offsets) > 25


def test_random_crops_have_the_box_that_were_drawn() -> None:
    """A horizontal ramp shows where each crop begins and ends."""
    ramp = torch.linspace(0, 1, 64).expand(200, 3, 64, 64).contiguous()
    got = BatchTransform(32, (0, 0, 0), (1, 1, 1), crop="random")(ramp, draws(200))
    first, last = got[:, 0, 16, 0] * 63, got[:, 0, 16, -1] * 63
    assert first.min() >= -0.5
    assert last.max() <= 63.5
    widths = (last - first) * 32 / 31
    assert 36 < widths.min() < 45  # least area and ratio: 64 * sqrt(0.5 * 3 / 4) = 39
    assert 62 < widths.max() <= 65
    assert first.unique().numel() > 100
    central = BatchTransform(56, (0, 0, 0), (1, 1, 1), crop="central")(ramp[:1], draws(1))
    torch.testing.assert_close(central, ramp[:1, :, 4:60, 4:60])


def test_a_photograph_is_cut_where_the_same_pixels_of_a_batch_would_be() -> None:
    """Before and after crops, in whole pixels; without entropy the middle, as torchvision resizes and crops it."""
    picture = tf.resize(images(1, 12)[0], [96, 64], antialias=True)
    of_training = Cut("random")
    widths = set()
    for i in range(50):
        left, top, right, bottom = map(round, _box(96, 64, uniform_draws((1, i)).tolist()))
        assert 0 <= left < right <= 64
        assert 0 <= top < bottom <= 96
        expected = tf.resized_crop(picture, top, left, bottom - top, right - left, [32, 32], antialias=True)
        got = of_training(picture, (1, i), (32, 32))
        assert got.dtype == torch.uint8
        assert torch.equal(got, expected)
        widths.add(right - left)
    assert len(widths) > 8
    of_evaluation = Cut("central")
    expected = tf.resize(tf.center_crop(picture, [56, 56]), [32, 32], antialias=True)
    assert torch.equal(of_evaluation(picture, None, (32, 32)), expected)
    whole = Cut()
    assert torch.equal(whole(picture, (1,), (32, 32)), tf.resize(picture, [32, 32], antialias=True))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    for transform in (
        BatchTransform(48, MEAN, STD, shift=True, flip=True),
        BatchTransform(24, MEAN, STD, crop="random", flip=True),
    ):
        together = transform(images(), draws())
        alone = torch.cat([transform(images()[i : i + 1], draws()[i : i + 1]) for i in range(5)])
        assert torch.equal(together, alone)


def test_timm_draws_are_seeded_and_options_checked() -> None:
    options = {"auto_augment": "rand-m9-mstd0.5", "color_jitter": 0.3, "re_prob": 1.0, "re_mode": "pixel"}
    transform = timm_transform(16, MEAN, STD, options)
    picture = images(1)[0]
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    seen = []
    for entropy in (1, 1, 2):
        seen.append(transform(picture, [entropy], (16, 16)))
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    for wrong in ({"auto_augmnt": "x"}, {"mean": [0, 0, 0]}, {"auto_augment": "nonsense"}):
        with pytest.raises(ConfigError, match=r"data\.timm"):
            timm_transform(16, MEAN, STD, wrong)


def test_draws_are_uniform() -> None:
    drawn = np.stack([uniform_draws((0, 3, i)) for i in range(4000)])
    assert drawn.shape == (4000, DRAWS)
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert abs(drawn.mean(0) - 0.5).max() < 0.02
    assert abs(np.corrcoef(drawn.T) - np.eye(DRAWS)).max() < 0.06


def test_mixing_mixes_labels_as_it_mixes_images() -> None:
    """Images of one colour each: the mean of a mixed image says how much of which is in it."""
    labels = torch.arange(7)
    flat = labels.float().view(7, 1, 1, 1).expand(7, 3, 8, 8)
    for alphas in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        mixing = Mixing(7, *alphas)
        seen = set()
        for entropy in range(20):
            mixed, soft = mixing(flat.clone(), labels, (0, entropy, 5))
            again, _ = mixing(flat.clone(), labels, (0, entropy, 5))
            assert torch.equal(mixed, again)
            torch.testing.assert_close(soft.sum(1), torch.ones(7))
            torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(7.0))
            seen.add(round(float(soft.max()), 4))
        assert len(seen) > 10
    unmixed = Mixing(7)(flat, labels, (0,))
    assert unmixed[0] is flat
    assert unmixed[1] is labels


def test_mixing_is_the_same_for_any_ranks_and_after_a_resume() -> None:
    digits = open_images("digits", image_size=8, split="train", classes=[0, 1, 2])
    mixing = Mixing(3, 0.5, 0.5)

    def rows(replicas: int, start: int = 0) -> dict[tuple[int, int], torch.Tensor]:
        """Soft labels by (batch, row)."""
        found = {}
        for replica in range(replicas):
            order = MicroBatchSampler(
                len(digits),
                micro_batch_size=8,
                slots=4 // replicas,
                replicas=replicas,
                replica=replica,
                seed=1,
            )
            order.set_epoch(2, start)
            for index, (_, labels) in enumerate(train_loader(digits, order, mixing=mixing)):
                batch, slot = divmod(index, order.slots)
                found[start + batch, slot * replicas + replica] = labels
        return found

    alone, shared, resumed = rows(1), rows(4), rows(2, start=5)
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[key], shared[key]) for key in alone)
    assert resumed.keys() == {key for key in alone if key[0] >= 5}
    assert all(torch.equal(alone[key], labels) for key, labels in resumed.items())


class TestSubsets:
    @given(
        st.integers(2, 5),
        st.integers(20, 60),
        st.sampled_from([0.1, 0.25, 0.5]),
        st.sampled_from([0.1, 0.5, 1]),
    )
    def test_parts_are_disjoint_stratified_and_fixed(
        self, classes, of_class, validation_fraction, train_fraction
    ):
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), of_class))
        options = {"train_fraction": train_fraction, "validation_fraction": validation_fraction}
        train, validation = training_and_validation(labels, seed=1, **options)
        assert not set(train) & set(validation)
        assert sorted(train) == list(train)
        rest = len(labels) - len(validation)
        assert abs(len(validation) - validation_fraction * len(labels)) < 1
        assert abs(len(train) - train_fraction * rest) < 1
        for part in (train, validation):
            counts = np.bincount(labels[part], minlength=classes)
            assert counts.max() - counts.min() <= 1
        again, same = training_and_validation(labels, seed=1, **options)
        assert np.array_equal(train, again)
        assert np.array_equal(validation, same)
        _, of_less = training_and_validation(labels, seed=1, **{**options, "train_fraction": 0.2})
        assert np.array_equal(validation, of_less)
        _, other = training_and_validation(labels, seed=2, **options)
        assert not np.array_equal(validation, other)

    def test_in_a_data_set(self):
        parts = {
            split: open_images(
                "digits", image_size=8, split=split, validation_fraction=0.2, train_fraction=0.5
            )
            for split in ("train", "validation", "test")
        }
        assert [len(parts[split]) for split in parts] == [575, 288, 360]
        seen = {split: {image.numpy().tobytes() for image, _ in part} for split, part in parts.items()}
        assert not seen["train"] & seen["validation"]
        with pytest.raises(DataError, match=r"validation_fraction=0 leaves"):
            open_images("digits", image_size=8, split="validation")
        with pytest.raises(DataError, match="cannot keep every class"):
            open_images("digits", image_size=8, split="train", train_fraction=0.001)
