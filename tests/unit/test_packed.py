"""Packed files: what goes in comes out, from every source, and damage is noticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from d2ft_hpc.cli import main
from d2ft_hpc.data.datasets import load
from d2ft_hpc.data.loader import train_loader
from d2ft_hpc.data.packed import describe, open_packed
from d2ft_hpc.data.packing import pack_by_name
from d2ft_hpc.data.sampler import MicroBatchSampler
from d2ft_hpc.errors import DataError
from tests.unit.test_data import assert_same

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of 12 + 6 smooth JPEG images of different sizes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
                size = (40 + 3 * i, 32 + 2 * i)
                coarse.resize(size, Image.Resampling.BICUBIC).save(
                    root / split / name / f"{i}.jpg", quality=95
                )
    return root


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("packed") / "images.h5"
    pack_by_name("image_folder", folder, file)
    return file


def batches(name: str, root: Path, *, workers: int = 0, start: int = 0, **options: object) -> list:
    """The micro-batches of an epoch of replica 1 of 2."""
    images = load(name, root=root, image_size=16, split="train", **options)
    order = MicroBatchSampler(len(images), micro_batch_size=2, slots=2, replicas=2, replica=1, seed=3)
    order.set_epoch(1, start_batch=start)
    return list(train_loader(images, order, num_workers=workers))


def test_the_original_bytes_and_batches_come_back(folder: Path, packed: Path) -> None:
    source = open_packed(packed, "test")
    assert source.class_names == CLASSES
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert source.images.blobs[3] == (folder / "test" / "bee" / "1.jpg").read_bytes()
    for augment in ("none", "shift", "resized_crop", "timm"):
        assert_same(
            batches("packed", packed, augment=augment), batches("image_folder", folder, augment=augment)
        )
    whole = batches("packed", packed)
    assert_same(batches("packed", packed, workers=2), whole)
    assert_same(batches("packed", packed, start=1), whole[2:])


def test_every_encoding(folder: Path, tmp_path: Path) -> None:
    for encoding in ("jpeg", "pixels"):
        pack_by_name(
            "image_folder",
            folder,
            tmp_path / f"{encoding}.h5",
            encoding=encoding,
            size=24,
            workers=2 * (encoding == "jpeg"),
        )
    pixels = open_packed(tmp_path / "pixels.h5", "train")
    assert pixels.images.size == (24, 24)
    jpeg = open_packed(tmp_path / "jpeg.h5", "train")
    assert len(jpeg.labels) == 12
    for index in (0, 7):
        picture = jpeg.images.picture(index)
        assert min(picture.size) == 24
        left = (picture.width - 24) // 2
        square = np.asarray(picture.crop((left, 0, left + 24, 24)), int)
        assert abs(square - np.asarray(pixels.images.picture(index), int)).mean() < 3
    # Pixels are cropped as a batch, files one by one: different draws, the same look.
    of_pixels, of_files = (
        batches("packed", tmp_path / f"{name}.h5", augment="none") for name in ("pixels", "jpeg")
    )
    for (one, labels), (other, other_labels) in zip(of_pixels, of_files, strict=True):
        assert torch.equal(labels, other_labels)
        assert one.shape == other.shape
        assert one.shape[1:] == (3, 16, 16)


def test_the_command_packs_users_arrays(
    folder: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (7, 9, 9, 3), np.uint8)
    labels = np.array([0, 1, 2, 1, 0, 2, 1])
    np.savez(
        tmp_path / "keras.npz", x_train=pixels, y_train=labels[:, None], x_test=pixels[:2], y_test=labels[:2]
    )
    with h5py.File(tmp_path / "grey.h5", "w") as file:
        for split, count in (("train", 7), ("test", 3)):
            file[f"{split}/images"], file[f"{split}/labels"] = pixels[:count, :, :, 0], labels[:count]
        file.attrs["classes"] = CLASSES
    with h5py.File(packed) as file, h5py.File(tmp_path / "encoded.h5", "w") as copied:
        for split in file:
            for name in ("bytes", "offsets", "labels"):  # chunked, as a user may have them
                copied.create_dataset(f"{split}/{name}", data=file[split][name], chunks=True)
    for name in ("keras.npz", "grey.h5", "encoded.h5"):
        size = ["--size", "12"] if name == "encoded.h5" else []
        output = tmp_path / f"packed-{name}.h5"
        assert main(["data", "pack", "arrays", str(output), "--root", str(tmp_path / name), *size]) == 0
        assert main(["data", "info", str(output)]) == 0
        assert "train  " in capsys.readouterr().out
    keras, grey, encoded = (
        open_packed(tmp_path / f"packed-{name}.h5", "train")
        for name in ("keras.npz", "grey.h5", "encoded.h5")
    )
    assert np.array_equal(keras.images.pixels[:], pixels.transpose(0, 3, 1, 2))
    assert keras.labels.tolist() == labels.tolist()
    assert keras.class_names == ("0", "1", "2")
    assert np.array_equal(grey.images.pixels[3, 2], pixels[3, :, :, 0])
    assert grey.class_names == CLASSES
    assert encoded.images.size == (12, 12)


def test_what_cannot_be_packed(folder: Path, packed: Path, tmp_path: Path) -> None:
    def refused(words: str, name: str = "image_folder", root: Path = folder, **options: object) -> None:
        with pytest.raises(DataError, match=words):
            pack_by_name(name, root, options.pop("output", tmp_path / "no.h5"), **options)

    refused("exists and is not overwritten", output=packed)
    refused(r"image 1 of train has .*choose --size", encoding="pixels")
    refused("--size changes the images", encoding="original", size=8)
    refused("cannot be written", output=tmp_path / "absent" / "no.h5")
    np.savez(tmp_path / "float.npz", x_train=np.zeros((2, 4, 4, 3)), y_train=np.zeros(2, int))
    refused(
        r"float\.npz: images are float64.*pixels must be uint8", name="arrays", root=tmp_path / "float.npz"
    )
    np.savez(tmp_path / "short.npz", x_train=np.zeros((2, 4, 4, 3), np.uint8), y_train=np.zeros(3, int))
    refused("3 labels", name="arrays", root=tmp_path / "short.npz")
    refused("train: is no file; an HDF5 file needs", name="arrays", root=folder / "train")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float.npz", "short.npz"]


def test_damage_is_noticed(packed: Path, tmp_path: Path) -> None:
    def damaged(change: object, words: str) -> None:
        shutil.copy(packed, tmp_path / "bad.h5")
        with h5py.File(tmp_path / "bad.h5", "r+") as file:
            change(file)
        with pytest.raises(DataError, match=words):
            describe(tmp_path / "bad.h5") if "checksum" in words else open_packed(
                tmp_path / "bad.h5", "train"
            )

    def set_value(path: str, index: int, value: int) -> object:
        return lambda file: file[path].__setitem__(index, value)

    damaged(set_value("train/bytes", 50, 7), "does not match its checksum")
    damaged(set_value("train/labels", 0, 1), "does not match its checksum")
    damaged(set_value("train/labels", 0, 9), "train: labels are 0 to 9, and there are 3 classes")
    damaged(set_value("train/offsets", 3, 10**9), "offsets of train do not divide")
    damaged(lambda file: file.attrs.__setitem__("version", 9), "version 9")
    damaged(lambda file: file.attrs.__delitem__("format"), "not a packed data set")
    damaged(lambda file: file.__delitem__("train"), "no split 'train', only test")
    shutil.copy(packed, tmp_path / "cut.h5")
    with (tmp_path / "cut.h5").open("rb+") as file:
        file.truncate(packed.stat().st_size // 2)
    with pytest.raises(DataError):
        open_packed(tmp_path / "cut.h5", "train")
    (tmp_path / "text.h5").write_text("text")
    with pytest.raises(
        DataError, match=r"text\.h5: damaged, or no HDF5 file .*make it by d2ft-hpc data pack"
    ):
        open_packed(tmp_path / "text.h5", "train")
