"""The data sets by name, each in its own file format; nothing is ever downloaded."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from torchvision import datasets as tv

from d2ft_hpc.data.folders import class_folders, class_names
from d2ft_hpc.data.huggingface import open_huggingface
from d2ft_hpc.data.images import (
    EncodedImages,
    FileBlobs,
    PixelImages,
    Source,
    checked_labels,
    list_of_classes,
)
from d2ft_hpc.data.packed import open_packed
from d2ft_hpc.data.webdataset import open_webdataset
from d2ft_hpc.errors import DataError
from d2ft_hpc.settings import meant

StoredSplit = Literal["train", "test"]


def open_source(name: str, root: Path | None, split: StoredSplit) -> Source:
    """One split of a data set.

    - `digits`: scikit-learn's 8x8 handwritten digits, in the installation itself; a fixed stratified 80/20 split.
    - `cifar10`, `cifar100`: `root` holds the unpacked python version, as torchvision keeps it.
    - `stanford_cars`: `root/stanford_cars/` as torchvision keeps it.
    - `image_folder`: `root/train/CLASS/*` and `root/test/CLASS/*` (or `root/val`); see folders.py.
    - `huggingface`: `root` holds what `DatasetDict.save_to_disk` wrote, or parquet or arrow files; see huggingface.py.
    - `webdataset`: `root` holds tar files; see webdataset.py.
    - `packed`: `root` is a file that `d2ft-hpc data pack` made.

    Raises DataError if the name is unknown or the files are absent or damaged.
    """
    if name == "digits":
        return _digits(split)
    if name not in _READERS:
        raise DataError(f"data.name={name!r}: {meant(name, ('digits', *_READERS))}")
    if root is None:
        raise DataError(
            f"data.root is not set: {name} needs the folder (packed: the file) that holds its images"
        )
    _check_root(name, root)
    return _READERS[name](root, split)


def _check_root(name: str, root: Path) -> None:
    """Raises DataError where the root is misspelt, of the wrong kind for this data set, or only a part of it. What it
    should hold is for the readers to say."""
    where = f"data.root={root}"
    near = [] if root.exists() else difflib.get_close_matches(root.name, _names_in(root.parent), n=1)
    if near:
        raise DataError(f"{where}: does not exist; did you mean data.root={root.parent / near[0]}?")
    if name == "packed" and not root.exists():
        raise DataError(f"{where}: no such file; make it by d2ft-hpc data pack")
    if name == "packed" and root.is_dir():
        raise DataError(
            f"{where}: a folder, but data.name=packed reads a file; set data.name=image_folder, or whichever the "
            f"folder is, or make the file by d2ft-hpc data pack"
        )
    if name != "packed" and root.is_file():
        raise DataError(
            f"{where}: a file, but data.name={name} reads a folder; set data.name=packed if d2ft-hpc data pack made "
            f"it, or data.root to the folder"
        )
    held = _HELD.get(name, "")
    if root.is_dir() and not (root / held).exists() and (root.parent / held).is_dir():
        raise DataError(
            f"{where}: only a part of the data set, which is in {root.parent}; set data.root={root.parent}"
        )


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


_HELD = {
    "cifar10": tv.CIFAR10.base_folder,
    "cifar100": tv.CIFAR100.base_folder,
    "stanford_cars": "stanford_cars",
    "image_folder": "train",
}
"""The folder in the root that tells it from one further down."""


def _digits(split: StoredSplit) -> Source:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    parts = train_test_split(range(len(bunch.images)), test_size=0.2, stratify=bunch.target, random_state=0)
    chosen = sorted(parts[0] if split == "train" else parts[1])
    grey = (bunch.images[chosen] / bunch.images.max()).astype(np.float32)
    pixels = np.repeat(grey[:, None], 3, axis=1)
    return Source(PixelImages(pixels), bunch.target[chosen].astype(np.int64), tuple("0123456789"))


def _cifar(reader: type[tv.CIFAR10]) -> Callable[[Path, StoredSplit], Source]:
    def open_it(root: Path, split: StoredSplit) -> Source:
        try:
            # torchvision compares every file with a known checksum before it reads it.
            images = reader(str(root), train=split == "train", download=False)
        except (RuntimeError, OSError) as error:
            folder = root / reader.base_folder
            raise DataError(
                f"{folder}: {reader.__name__} is missing or damaged; unpack {reader.filename} into data.root={root} so "
                f"that {folder / reader.train_list[0][0]} exists"
            ) from error
        pixels = np.ascontiguousarray(images.data.transpose(0, 3, 1, 2))
        return Source(PixelImages(pixels), np.array(images.targets, np.int64), tuple(images.classes))

    return open_it


_CARS_FILES = (
    "devkit/cars_meta.mat",
    "devkit/cars_train_annos.mat",
    "cars_test_annos_withlabels.mat",
    "cars_train/00001.jpg ...",
    "cars_test/00001.jpg ...",
)


def _stanford_cars(root: Path, split: StoredSplit) -> Source:
    try:
        cars = tv.StanfordCars(str(root), split=split, download=False)
        paths = tuple(Path(path) for path, _ in cars._samples)
        names = list_of_classes(cars.classes)
        labels = checked_labels(np.array([label for _, label in cars._samples], int), len(paths), names)
        outside = [path for path in paths if path.parent != cars._images_base_path]
        if outside:
            raise DataError(f"{outside[0]} is outside its folder")
    except Exception as error:  # scipy answers damage with many kinds
        raise DataError(
            f"data.root={root}: Stanford Cars is missing or damaged ({error}). Its original address is gone "
            f"and torchvision cannot download it: take a copy (cars_train.tgz, cars_test.tgz, car_devkit.tgz and "
            f"cars_test_annos_withlabels.mat) and unpack it so that {root / 'stanford_cars'} has "
            f"{', '.join(_CARS_FILES)}"
        ) from error
    return Source(EncodedImages(FileBlobs(paths)), labels, names)


def _image_folder(root: Path, split: StoredSplit) -> Source:
    folders = [root / "train"] if split == "train" else [root / "test", root / "val"]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        lacks = f"has no {' and no '.join(f.name for f in folders)}" if root.is_dir() else "no such folder"
        raise DataError(f"data.root={root}: {lacks}; put the images of each class into {folders[0]}/CLASS/")
    images = class_folders(folder)
    if split == "test" and (root / "train").is_dir():
        # Labels are places in the sorted class names, so both splits must have the same names.
        known = class_names(root / "train")
        if known and known != images.class_names:
            differing = ", ".join(sorted(set(known) ^ set(images.class_names)))
            raise DataError(
                f"{folder} and {root / 'train'} must have the same class folders; these differ: {differing}"
            )
    return images


_READERS: dict[str, Callable[[Path, StoredSplit], Source]] = {
    "cifar10": _cifar(tv.CIFAR10),
    "cifar100": _cifar(tv.CIFAR100),
    "stanford_cars": _stanford_cars,
    "image_folder": _image_folder,
    "huggingface": open_huggingface,
    "webdataset": open_webdataset,
    "packed": open_packed,
}
