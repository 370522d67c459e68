"""Packed files: what goes in comes out, from every source, and damage is noticed."""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from d2ft_hpc.cli import main
from d2ft_hpc.data.arrays import open_arrays
from d2ft_hpc.data.loader import train_loader
from d2ft_hpc.data.packed import describe, open_packed
from d2ft_hpc.data.packing import pack_by_name
from d2ft_hpc.data.sampler import MicroBatchSampler
from d2ft_hpc.errors import DataError
from d2ft_hpc.files import hdf5
from tests.splits import open_images
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
    images = open_images(name, root=root, image_size=16, split="train", **options)
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


def test_files_that_were_cut_short_are_not_packed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    image = tmp_path / "cut" / "train" / "bee" / "0.jpg"
    image.write_bytes(image.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"bee/0\.jpg: not a readable image"):
        pack_by_name("image_folder", tmp_path / "cut", tmp_path / "packed.h5")
    assert not (tmp_path / "packed.h5").exists()


def test_every_encoding(folder: Path, tmp_path: Path) -> None:
    for encoding in ("jpeg", "pixels"):
        pack_by_name(
            "image_folder",
            folder,
            tmp_path / f"{encoding}.h5",
            encoding=encoding,
            size=24,
            workers=int(encoding == "jpeg"),
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
    folder: Path, packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
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
        told = capfd.readouterr()
        assert "train  " in told.out
        assert ("only the middle 12 x 12 pixels are kept" in told.err) == bool(size)
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
    refused("there is no folder .*absent; make it", output=tmp_path / "absent" / "no.h5")
    np.savez(tmp_path / "float.npz", x_train=np.zeros((2, 4, 4, 3)), y_train=np.zeros(2, int))
    refused(
        r"float\.npz: images are float64.*pixels must be uint8", name="arrays", root=tmp_path / "float.npz"
    )
    np.savez(tmp_path / "short.npz", x_train=np.zeros((2, 4, 4, 3), np.uint8), y_train=np.zeros(3, int))
    refused("3 labels", name="arrays", root=tmp_path / "short.npz")
    arrays = {"x_train": np.zeros((3, 4, 4, 3), np.uint8), "y_train": np.array([0, 3, 2])}
    for label in (1, 12):  # in the midst of train's and beyond
        arrays |= {"x_test": arrays["x_train"][:2], "y_test": np.array([label, 0])}
        np.savez(tmp_path / "other.npz", **arrays)
        refused(rf"other\.npz: .*: {label}$", name="arrays", root=tmp_path / "other.npz")
    refused("train: is no file; an HDF5 file needs images and labels", name="arrays", root=folder / "train")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float.npz", "other.npz", "short.npz"]


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


def refused_in_one_line(read: Callable[[], object], file: Path, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read()
    text = str(caught.value)
    assert text.startswith(f"{file}: ")
    assert "\n" not in text
    assert len(text) < len(str(file)) + 300


def put(name: str, **options: Any) -> Callable[[h5py.File], None]:
    """Puts a dataset in place of another."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **options)

    return change


def link(name: str, target: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = target

    return change


def virtual(name: str, shape: tuple[int, ...]) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        layout = h5py.VirtualLayout(shape, np.uint8)
        layout[:] = h5py.VirtualSource("elsewhere.h5", "x", shape)
        file.create_virtual_dataset(name, layout)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (link("train", h5py.SoftLink("/test")), "/train is a link"),
        (link("train", h5py.ExternalLink("/etc/other.h5", "/train")), "/train is a link"),
        (link("train/labels", h5py.ExternalLink("/etc/other.h5", "/x")), "/train/labels is a link"),
        (link("train/bytes", h5py.SoftLink("/test/bytes")), "/train/bytes is a link"),
        (put("train/bytes", shape=(99,), dtype="u1", external=[("/etc/passwd", 0, 99)]), "in other files"),
        (virtual("train/bytes", (99,)), "lies in other files"),
        (put("train/bytes", shape=(10**12,), dtype="u1", chunks=(10**6,), compression="gzip"), "contiguous"),
        (put("train/labels", shape=(10**12,), dtype="i8", chunks=(10**6,)), "contiguous int64"),
        (put("train/labels", shape=(10**12,), dtype="i8"), "contiguous int64"),
        (put("train/labels", data=np.zeros(12, "u1")), "contiguous int64"),
        (put("train/labels", data=np.full(12, -1)), "labels are -1 to -1"),
        (put("train/offsets", data=np.zeros(13)), "contiguous int64"),
        (put("train/offsets", data=np.array([0, 2**63 - 1, -(2**63), 99])), "offsets of train do not divide"),
        (link("train/offsets", 5), "contiguous int64"),
        (link("train", 5), "no array 'labels'"),
        (lambda file: file.attrs.__setitem__("classes", "catdogcow"), "`classes` are no list of names"),
        (
            lambda file: file.attrs.__setitem__("classes", np.bytes_("catdog")),
            "class names are .*make it a list",
        ),
        (lambda file: file.attrs.__setitem__("classes", np.array([b"\xff"])), "not in UTF-8"),
        (lambda file: file.attrs.__setitem__("format", np.zeros(3)), "not a packed data set"),
    ],
)
def test_nothing_leads_out_of_a_packed_file_or_claims_more_than_it_holds(
    change: Callable[[h5py.File], None], words: str, packed: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.h5"
    shutil.copy(packed, bad)
    with h5py.File(bad, "r+") as file:
        change(file)
    refused_in_one_line(lambda: open_packed(bad, "train"), bad, words)
    refused_in_one_line(lambda: describe(bad), bad, words)


def test_a_pipe_is_no_packed_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused_in_one_line(lambda: open_packed(tmp_path / "pipe", "train"), tmp_path / "pipe", "is no file")


PIXELS = np.arange(4 * 5 * 6 * 3, dtype=np.uint8).reshape(4, 5, 6, 3)
LABELS = np.array([0, 1, 0, 1])


@pytest.mark.parametrize("form", ["last", "first", "grey", "grey_last"])
def test_forms_of_arrays(form: str, tmp_path: Path) -> None:
    images = {
        "last": PIXELS,
        "first": PIXELS.transpose(0, 3, 1, 2),
        "grey": PIXELS[..., 0],
        "grey_last": PIXELS[..., :1],
    }[form]
    np.savez(tmp_path / "a.npz", x_train=images, y_train=LABELS)
    source = open_arrays(tmp_path / "a.npz", "train")
    expected = np.repeat(PIXELS[..., :1], 3, axis=3) if form.startswith("grey") else PIXELS
    assert np.array_equal(source.images.pixels, expected.transpose(0, 3, 1, 2))
    assert source.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (PIXELS.astype(np.uint16), LABELS, "images are uint16 .*pixels must be uint8, 0 to 255"),
        (PIXELS.astype(int), LABELS, "images are int64"),
        (PIXELS / 255, LABELS, "images are float64.*such as x . 255 for 0 to 1"),
        (PIXELS > 0, LABELS, "images are bool"),
        (np.array([{}] * 4, object), LABELS, "Object arrays cannot be loaded"),
        (np.array(5, np.uint8), LABELS, r"images are uint8 \[\]"),
        (PIXELS[:0], LABELS[:0], r"images are uint8 \[0"),
        (PIXELS[..., :2], LABELS, "images are uint8"),
        (PIXELS, LABELS / 2, "4 labels of type float64 for 4 images: each needs one whole number"),
        (PIXELS, LABELS - 1, "labels are -1 to 0: they must not be negative"),
        (PIXELS, LABELS + 2**40, "labels go up to .*number the classes from 0"),
        (PIXELS, LABELS[:3], "3 labels of type int64 for 4 images"),
    ],
)
def test_arrays_of_other_types_and_shapes_are_refused(
    images: Any, labels: Any, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, x_train=images, y_train=labels)
    refused_in_one_line(lambda: open_arrays(file, "train"), file, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.attrs.__setitem__("classes", "ab"), r"class names are 'ab': make it a list"),
        (lambda file: file.attrs.__setitem__("classes", ["a"]), "there are 1 classes"),
        (link("train", h5py.SoftLink("/test")), "/train is a link"),
        (link("train/images", h5py.ExternalLink("/etc/other.h5", "/x")), "/train/images is a link"),
        (virtual("train/images", (4, 5, 6, 3)), "in other files"),
        (put("train/images", shape=(10**6, 10**4, 100, 3), dtype="u1", chunks=(1, 9, 9, 3)), "GB are free"),
        (
            put("train/images", shape=(10**4, 400, 400, 3), dtype="u1", chunks=(1, 400, 400, 3)),
            "far more than",
        ),
        (put("train/images", data=PIXELS, compression="lzf"), "something else than gzip: store it anew"),
        (put("train/images", data=["a", "b"]), "store numbers"),
        (lambda file: file.__delitem__("train/labels"), "no array 'labels'; an HDF5 file needs"),
        (lambda file: file.__delitem__("train"), "no group 'train': an HDF5 file needs"),
    ],
)
def test_arrays_of_hdf5_are_refused(change: Callable[[h5py.File], None], words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for split in ("train", "test"):
            file[f"{split}/images"], file[f"{split}/labels"] = PIXELS, LABELS
        change(file)
    refused_in_one_line(lambda: open_arrays(path, "train"), path, words)


@pytest.mark.parametrize(
    "header", ["{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000, 1000)}", "((("]
)
def test_what_an_array_claims_is_checked_before_it_is_allocated(header: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x_train.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode())
    refused_in_one_line(lambda: open_arrays(path, "train"), path, "damaged")
    for name, content in (("b.npz", b"PK text"), ("c.npz", b""), ("d.h5", b"text"), ("e.npy", b"\x93NUMPY")):
        (tmp_path / name).write_bytes(content)
        refused_in_one_line(partial(open_arrays, tmp_path / name, "train"), tmp_path / name, "damaged, or no")


def test_a_file_that_is_almost_only_zeros_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 KB that stand for 30 MB, true to every head and checksum."""
    monkeypatch.setattr(hdf5, "_FREE_BYTES", 1 << 20)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x_train=np.zeros((1000, 100, 100, 3), np.uint8), y_train=np.zeros(1000, int))
    words = "x_train unpacks to far more than its file holds; divide it"
    refused_in_one_line(lambda: open_arrays(path, "train"), path, words)


def test_images_may_be_stored_one_by_one(tmp_path: Path) -> None:
    """In pieces however small."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for name, data in (("images", np.repeat(PIXELS, 500, axis=0)), ("labels", np.repeat(LABELS, 500))):
            file.create_dataset(
                f"train/{name}", data=data, chunks=(1, *data.shape[1:]), maxshape=(None, *data.shape[1:]),
                compression="gzip",
            )  # fmt: skip
    source = open_arrays(path, "train")
    assert np.array_equal(source.images.take([7, 1999]), PIXELS[[0, 3]].transpose(0, 3, 1, 2))
    assert np.array_equal(source.images.picture(1999), PIXELS[3])
    assert source.labels.tolist() == np.repeat(LABELS, 500).tolist()


@pytest.mark.parametrize("option", ["--size=0", "--size=x", "--workers=-1", "--quality=0", "--quality=101"])
def test_numbers_out_of_range_are_wrong_usage(
    option: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "pack", "image_folder", str(tmp_path / "x.h5"), "--root", str(folder), option])
    assert ended.value.code == 2
    name, value = option.split("=")
    assert f"argument {name}: {value!r} is not a whole number" in capsys.readouterr().err


def test_a_size_that_nobody_could_decode_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"0\.jpg: cannot be encoded \(it would become 1\d+ x 100000.*another --size"
    ):
        pack_by_name("image_folder", folder, tmp_path / "x.h5", size=100_000)
