"""Data sets in the file formats in which they are distributed."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100

from d2ft_hpc.data.sources import open_source
from d2ft_hpc.errors import DataError
from tests.splits import open_images

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def put_image(file: Path, red: int, size: tuple[int, int] = (30, 20)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 0, 0)).save(file)


def test_unknown_name() -> None:
    with pytest.raises(DataError, match=r"^data\.name='svhn': input should be 'digits', 'cifar10'"):
        open_source("svhn", None, "train")
    with pytest.raises(DataError, match=r"^data\.name='cifar-10': did you mean 'cifar10'\?"):
        open_source("cifar-10", None, "train")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stanford_cars", "image_folder", "packed"])
def test_missing_root(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root is not set"):
        open_images(name, image_size=8, split="train")
    with pytest.raises(DataError, match=str(tmp_path / "nowhere")):
        open_images(name, image_size=8, split="train", root=tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_root_of_the_wrong_kind_or_place_is_told_by_its_key(tmp_path: Path) -> None:
    put_image(tmp_path / "photos/train/cat/a.png", 255)
    (tmp_path / "photos.h5").touch()
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name, root, told in (
        (
            "packed",
            "photos",
            r"photos: a folder, but .*; set data\.name=image_folder, or .* d2ft-hpc data pack",
        ),
        ("packed", "other.h5", r"other\.h5: no such file; make it by d2ft-hpc data pack"),
        (
            "image_folder",
            "photos.h5",
            r"photos\.h5: a file, but data\.name=image_folder .*set data\.name=packed",
        ),
        ("webdataset", "photos.h5", r"photos\.h5: a file, but data\.name=webdataset .*set data\.name=packed"),
        ("image_folder", "photo", rf"photo: does not exist; did you mean data\.root={tmp_path}/photos\?"),
        (
            "image_folder",
            "absent",
            r"absent: no such folder; put the images of each class into .*absent/train/",
        ),
        ("image_folder", "photos/train", rf"photos/train: only a part .*set data\.root={tmp_path}/photos$"),
        ("cifar10", "cifar-10-batches-py", rf"batches-py: only a part .*set data\.root={tmp_path}$"),
        ("webdataset", "photos/train", rf"no \*\.tar file .*set data\.root={tmp_path}/photos, which"),
    ):
        with pytest.raises(DataError, match=rf"^data\.root={tmp_path}/.*{told}"):
            open_source(name, tmp_path / root, "train")


def put_cifar(monkeypatch: pytest.MonkeyPatch, root: Path, reader: type[CIFAR10]) -> np.ndarray:
    """Batches, labels and class names pickled as the data set's own, and the checksums that torchvision expects."""
    folder = root / reader.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), np.uint8)
    labels = "labels" if reader is CIFAR10 else "fine_labels"
    train, test = ("data_batch_1", "test_batch") if reader is CIFAR10 else ("train", "test")
    meta, key = reader.meta["filename"], reader.meta["key"]
    files = {
        train: {"data": pixels.reshape(20, -1), labels: [i % 10 for i in range(20)]},
        test: {"data": pixels[:5].reshape(5, -1), labels: [1, 2, 3, 4, 5]},
        meta: {key: [f"class {i}" for i in range(10)]},
    }
    sums = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(reader, "train_list", [[train, sums[train]]])
    monkeypatch.setattr(reader, "test_list", [[test, sums[test]]])
    monkeypatch.setattr(reader, "meta", {"filename": meta, "key": key, "md5": sums[meta]})
    return pixels


@pytest.mark.parametrize(("name", "reader"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar(name: str, reader: type[CIFAR10], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = put_cifar(monkeypatch, tmp_path, reader)
    test = open_images(name, root=tmp_path, image_size=32, split="test", **PLAIN)
    assert test.labels == [1, 2, 3, 4, 5]
    assert test.num_classes == 10
    torch.testing.assert_close(test[3][0], torch.from_numpy(pixels[3]).float() / 255)
    train = open_images(name, root=tmp_path, image_size=16, split="train")
    assert len(train) == 20
    assert train[0][0].shape == (3, 16, 16)
    first = reader.train_list[0][0]
    (tmp_path / reader.base_folder / first).write_bytes(b"damaged")
    with pytest.raises(DataError, match=f"missing or damaged.*{first}"):
        open_images(name, root=tmp_path, image_size=32, split="train")


def test_stanford_cars(tmp_path: Path) -> None:
    """MATLAB annotations as the devkit has them: labels from 1, file names beside bounding boxes."""
    folder = tmp_path / "stanford_cars"
    fields = [
        ("bbox_x1", "O"),
        ("bbox_y1", "O"),
        ("bbox_x2", "O"),
        ("bbox_y2", "O"),
        ("class", "O"),
        ("fname", "O"),
    ]
    (folder / "devkit").mkdir(parents=True)

    def annotate(file: Path, classes: list[int]) -> None:
        rows = [(1, 1, 20, 15, label, f"{i:05}.jpg") for i, label in enumerate(classes, 1)]
        savemat(file, {"annotations": np.array(rows, dtype=fields).reshape(1, -1)})

    annotate(folder / "devkit" / "cars_train_annos.mat", [2, 1, 2])
    annotate(folder / "cars_test_annos_withlabels.mat", [1, 2])
    names = np.array([["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    for i, red in enumerate((0, 100, 255), 1):
        put_image(folder / "cars_train" / f"{i:05}.jpg", red)
    with pytest.raises(DataError, match=r"original address is gone.*cars_test_annos_withlabels\.mat"):
        open_images("stanford_cars", root=tmp_path / "elsewhere", image_size=8, split="train")
    with pytest.raises(DataError, match="missing or damaged"):
        open_images("stanford_cars", root=tmp_path, image_size=8, split="test")
    for i in (1, 2):
        put_image(folder / "cars_test" / f"{i:05}.jpg", 255)
    train = open_images("stanford_cars", root=tmp_path, image_size=8, split="train", **PLAIN)
    assert train.labels == [1, 0, 1]
    assert train.num_classes == 2
    assert [round(float(train[i][0][0].mean()), 1) for i in range(3)] == [0.0, 0.4, 1.0]
    assert open_images("stanford_cars", root=tmp_path, image_size=8, split="test").labels == [0, 1]


def test_image_folder(tmp_path: Path) -> None:
    put_image(tmp_path / "train/cat/a.png", 255)
    put_image(tmp_path / "train/dog/b.png", 0)
    with pytest.raises(DataError, match=r"data\.root=.*: has no test and no val; put"):
        open_images("image_folder", root=tmp_path, image_size=8, split="test")
    put_image(tmp_path / "val/dog/c.png", 255)
    with pytest.raises(DataError, match="these differ: cat"):
        open_images("image_folder", root=tmp_path, image_size=8, split="test")
    put_image(tmp_path / "val/cat/d.png", 0)
    test = open_images("image_folder", root=tmp_path, image_size=8, split="test")
    assert [test[i][0].amax().item() for i in range(2)] == [-1, 1]
    assert test.labels == [0, 1]
    train = open_images("image_folder", root=tmp_path, image_size=8, split="train")
    assert train[1][0].shape == (3, 8, 8)
    assert train.num_classes == 2
    (tmp_path / "train/dog/b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png: not a readable image"):
        train[1]
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="empty"):
        open_images("image_folder", root=tmp_path / "empty", image_size=8, split="train")


def test_every_file_that_is_an_image_counts_and_the_others_are_told(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            put_image(tmp_path / split / name / "1.png", 255)
    for name in ("2.JFIF", "3.avif", "deep/4.gif", "5.jp2", "6.webp"):
        file = tmp_path / "train/cat" / name
        put_image(file.with_suffix(".png"), 0)
        Image.open(file.with_suffix(".png")).save(file, "JPEG" if name == "2.JFIF" else None)
        file.with_suffix(".png").unlink()
    # What systems leave behind is no fault and no news.
    for name in ("cat/Thumbs.db", "cat/.DS_Store", "cat/._1.png", ".ipynb_checkpoints/x", "desktop.ini"):
        file = tmp_path / "train" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"no image")
    quiet = open_images("image_folder", root=tmp_path, image_size=8, split="train", **PLAIN)
    assert quiet.labels == [0] * 6 + [1]
    assert quiet.remark == ""
    assert [round(float(quiet[i][0][0].mean()), 1) for i in range(7)] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    for name in ("cat/7.heic", "dog/8.heic", "dog/noend", "readme.txt"):
        (tmp_path / "train" / name).write_bytes(b"no image")
    put_image(tmp_path / "train" / "beside.png", 0)
    remark = open_images("image_folder", root=tmp_path, image_size=8, split="train").remark
    assert remark.startswith(f"{tmp_path}/train: left out 5 files (2 .heic, ")
    for kind in ("1 no ending", "1 .txt", "1 .png"):
        assert kind in remark
    assert open_images("image_folder", root=tmp_path, image_size=8, split="test").remark == ""


def test_folders_that_are_refused(tmp_path: Path) -> None:
    put_image(tmp_path / "train/cat/1.png", 255)
    dog = tmp_path / "train/dog"
    dog.mkdir()

    def refused(words: str) -> None:
        with pytest.raises(DataError, match=words) as caught:
            open_images("image_folder", root=tmp_path, image_size=8, split="train")
        assert "\n" not in str(caught.value)

    (dog / "1.heic").touch()
    refused(r"train/dog: holds no image but 1 file \(1 \.heic\); put images there")
    put_image(dog / "1.png", 255)
    for make in (lambda path: path.symlink_to("/nowhere"), os.mkfifo):
        make(dog / "x.png")
        refused(r"dog/x\.png: neither a file nor a folder, or a broken link")
        (dog / "x.png").unlink()
    (dog / "up").symlink_to("..")
    refused("dog/up: leads back to a folder above it")
