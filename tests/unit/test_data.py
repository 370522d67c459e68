"""The sampler's promises, the bundled digits, and loaders with real worker processes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from d2ft_hpc.data import datasets
from d2ft_hpc.data.loader import eval_loader, train_loader
from d2ft_hpc.data.sampler import MicroBatchSampler
from d2ft_hpc.data.sources import open_source
from d2ft_hpc.errors import DataError
from tests.splits import open_images


def sampler(num_samples: int = 100, replica: int = 0, **changes: int) -> MicroBatchSampler:
    options = {"micro_batch_size": 4, "slots": 3, "replicas": 2, "seed": 7, **changes}
    return MicroBatchSampler(num_samples, replica=replica, **options)


class TestSampler:
    @given(
        st.integers(1, 300),
        st.integers(1, 6),
        st.integers(1, 4),
        st.integers(1, 4),
        st.integers(0, 5),
    )
    def test_replicas_share_out_every_batch(self, num_samples, micro_batch_size, slots, replicas, epoch):
        rows = slots * replicas
        sizes = {"micro_batch_size": micro_batch_size, "slots": slots, "replicas": replicas}
        if num_samples < rows:
            with pytest.raises(DataError, match=f"{num_samples} samples, fewer than the {rows}"):
                sampler(num_samples, **sizes)
            return
        per_replica = []
        for replica in range(replicas):
            one = sampler(num_samples, replica, **sizes)
            one.set_epoch(epoch)
            per_replica.append(list(one))
            assert len(per_replica[-1]) == len(one) == one.batches_per_epoch * slots
        alone = sampler(num_samples, micro_batch_size=micro_batch_size, slots=rows, replicas=1)
        alone.set_epoch(epoch)
        gather_scores = list(alone)
        drawn = [i for rows_of_one in per_replica for row in rows_of_one for i in row]
        assert len(drawn) == len(set(drawn))
        rest = num_samples % (rows * micro_batch_size)
        assert len(drawn) == num_samples - (rest if rest < rows else 0)
        for batch in range(one.batches_per_epoch):
            # Row = slot * replicas + replica: put the replicas' lists back together in that order.
            together = [
                per_replica[replica][batch * slots + slot]
                for slot in range(slots)
                for replica in range(replicas)
            ]
            assert gather_scores[batch * rows : (batch + 1) * rows] == together
            lengths = {len(row) for row in together}
            if batch < num_samples // (rows * micro_batch_size):
                assert lengths == {micro_batch_size}
            else:
                assert max(lengths) - min(lengths) <= 1

    def test_seed_and_epoch_choose_the_order(self):
        one, other = sampler(), sampler(seed=8)
        first = list(one)
        assert list(one) == first == list(sampler())
        assert list(other) != first
        one.set_epoch(1)
        assert list(one) != first

    def test_start_batch_resumes_in_mid_epoch(self):
        one = sampler()  # 4 full batches of 24 samples; 4 left over are fewer than the 6 rows
        whole = list(one)
        assert one.batches_per_epoch == 4
        one.set_epoch(0, start_batch=3)
        assert list(one) == whole[9:]
        assert len(one) == 3
        one.set_epoch(0)
        assert list(one) == whole


class TestDigits:
    def test_form(self):
        train = open_images("digits", image_size=32, split="train")
        test = open_images("digits", image_size=32, split="test")
        assert len(train) + len(test) == 1797
        assert len(test) == 360
        assert train.num_classes == 10
        image, label = train[0]
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.float32
        assert isinstance(label, int)
        pixels = torch.stack([train[i][0] for i in range(50)])
        assert pixels.min() >= -1
        assert pixels.max() <= 1
        assert pixels.max() - pixels.min() > 1.5
        counts = np.bincount(test.labels)  # stratified
        assert counts.max() - counts.min() <= 2

    def test_splits_are_disjoint_and_fixed(self):
        train, test, again = (
            open_images("digits", image_size=8, split=split, mean=(0, 0, 0), std=(1, 1, 1))
            for split in ("train", "test", "train")
        )
        assert torch.equal(train[5][0], again[5][0])
        images = {image.numpy().tobytes() for image, _ in train}
        assert len(images) > 1400
        assert not images & {image.numpy().tobytes() for image, _ in test}

    def test_classes_are_kept_and_relabelled(self):
        plain = open_images("digits", image_size=8, split="test")
        kept = open_images("digits", image_size=8, split="test", classes=[9, 5])
        assert kept.num_classes == 2
        expected = [(image, [9, 5].index(label)) for image, label in plain if label in (5, 9)]
        assert [label for _, label in expected] == kept.labels
        assert all(torch.equal(image, kept[i][0]) for i, (image, _) in enumerate(expected))

    @pytest.mark.parametrize(
        ("classes", "fault"), [([3, 12], r"no image of \[12\]"), ([3, 3], "named twice")]
    )
    def test_bad_classes(self, classes, fault):
        with pytest.raises(DataError, match=fault):
            open_images("digits", image_size=8, split="test", classes=classes)

    def test_augmentation_is_for_training(self):
        train = open_images("digits", image_size=8, split="train", augment="shift")
        assert len({train[0][0].numpy().tobytes() for _ in range(10)}) > 1
        test = open_images("digits", image_size=8, split="test", augment="shift")
        assert torch.equal(test[0][0], test[0][0])


def assert_same(left: list, right: list) -> None:
    assert len(left) == len(right) > 0
    for (images, labels), (other_images, other_labels) in zip(left, right, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


class TestLoaders:
    def test_workers_and_resume_change_nothing(self):
        """Two real worker processes, not forked, against none; both epochs use the same workers."""
        digits = open_images("digits", image_size=8, split="train", classes=[0, 1], augment="shift")
        order = sampler(len(digits), micro_batch_size=16)
        alone, helped = train_loader(digits, order), train_loader(digits, order, num_workers=2)
        epochs = []
        for epoch in range(2):
            order.set_epoch(epoch)
            state = torch.get_rng_state()
            epochs.append(list(alone))
            assert_same(epochs[-1], list(helped))
            assert torch.equal(state, torch.get_rng_state())
        assert len(alone) == len(order)
        order.set_epoch(1, start_batch=1)
        assert_same(list(alone), epochs[1][3:])

    def test_augmentation_differs_between_epochs_and_samples(self):
        digits = open_images("digits", image_size=32, split="train", classes=[0], augment="shift")
        order = sampler(len(digits), micro_batch_size=1, slots=1, replicas=1)
        loader = train_loader(digits, order)
        seen = []
        for epoch in range(2):
            order.set_epoch(epoch)
            seen.append({indices[0]: images for indices, (images, _) in zip(order, loader, strict=True)})
        alike = [torch.equal(seen[0][i], seen[1][i]) for i in range(len(digits))]
        assert sum(alike) < len(digits) / 20  # 162 shifts and flips: few come twice

    def test_evaluation_shares_have_every_sample_once(self):
        digits = open_images("digits", image_size=8, split="test")
        shares = [
            list(eval_loader(digits, batch_size=50, replicas=7, replica=replica)) for replica in range(7)
        ]
        images = torch.cat([images for share in shares for images, _ in share])
        assert len(images) == len(digits)
        expected = {image.numpy().tobytes() for image, _ in digits}
        assert {image.numpy().tobytes() for image in images} == expected
        sizes = [sum(len(labels) for _, labels in share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("side", "augmentation"), [(32, "shift"), (65, "resized_crop")])
def test_small_images_are_shifted_however_they_are_stored(
    tmp_path: Path, side: int, augmentation: str
) -> None:
    for split, kind in itertools.product(("train", "test"), ("cat", "dog")):
        (tmp_path / split / kind).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (side, side - 1)).save(tmp_path / split / kind / f"{index}.png")
    source = open_source("image_folder", tmp_path, "train")
    assert datasets._automatic("image_folder", source) == augmentation
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no picture")
    assert datasets._automatic("image_folder", open_source("image_folder", tmp_path, "train")) == augmentation


def test_up_to_a_thousand_images_are_looked_at_before_a_run(tmp_path: Path) -> None:
    for split, kind in itertools.product(("train", "test"), ("cat", "dog")):
        (tmp_path / split / kind).mkdir(parents=True)
        for index in range(50):
            Image.new("RGB", (8, 8)).save(tmp_path / split / kind / f"{index:02d}.png")
    for index in (1, 50, 98):
        damaged = sorted((tmp_path / "train").rglob("*.png"))[index]
        content = damaged.read_bytes()
        damaged.write_bytes(b"no picture")
        with pytest.raises(DataError, match=f"{damaged.name}.*not a readable image"):
            open_images("image_folder", image_size=8, split="train", root=tmp_path).look_at_some()
        damaged.write_bytes(content)
