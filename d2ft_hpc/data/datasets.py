"""Labelled image data sets by name: float32 images [3, image_size, image_size] and int labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets as tv
from torchvision.transforms import v2

from d2ft_hpc.errors import DataError

Split = Literal["train", "test"]
Transform = Callable[[Any], Tensor]

NAMES = ("digits", "cifar10", "cifar100", "image_folder")


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images with labels 0..num_classes-1; `source[i][0]` is image i before `transform`.

    `classes` keeps only those of the source's labels; `classes[k]` becomes label k.
    Raises DataError if a kept class has no image.
    """

    def __init__(
        self,
        source: Any,
        source_labels: Sequence[int],
        transform: Transform,
        classes: Sequence[int],
    ) -> None:
        label_of = {original: label for label, original in enumerate(classes)}
        self._source = source
        self._transform = transform
        self._indices = [i for i, label in enumerate(source_labels) if label in label_of]
        self.labels = [label_of[source_labels[i]] for i in self._indices]
        self.num_classes = len(classes)
        absent = sorted(set(classes) - {source_labels[i] for i in self._indices})
        if absent or len(label_of) < len(classes):
            fault = f"no image of {absent}" if absent else "a class named twice"
            raise DataError(
                f"data.classes = {list(classes)}: {fault}; the data set has the classes "
                f"{sorted(set(source_labels))}: choose each at most once"
            )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._source[self._indices[index]][0]
        return self._transform(image), self.labels[index]


def load(
    name: str,
    *,
    image_size: int,
    split: Split,
    root: Path | None = None,
    classes: Sequence[int] | None = None,
    augment: bool | None = None,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    split_seed: int = 0,
) -> LabelledImages:
    """Open a data set; nothing is ever downloaded.

    - `digits`: scikit-learn's 8x8 handwritten digits, in the installation itself; `split_seed` fixes the
      stratified 80/20 split.
    - `cifar10`, `cifar100`: `root` holds the unpacked python version, as torchvision keeps it.
    - `image_folder`: `root/train/CLASS/*` and `root/test/CLASS/*` (or `root/val`).

    `classes` keeps and relabels (see LabelledImages). `augment` applies to the training split only and is
    on by default except for digits: crops and flips for photographs, small affine maps for digits. Values in
    [0, 1] become (value - mean) / std per channel.
    Raises DataError if the name is unknown or the files are absent or damaged.
    """
    if name not in NAMES:
        raise DataError(f"data.name = {name!r}: unknown; the data sets are {', '.join(NAMES)}")
    if augment is None:
        augment = name != "digits"
    augment = augment and split == "train"
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    pixels: list[Any]
    source: Any
    if name == "digits":
        source, labels = _digits(split, split_seed)
        pixels = [v2.Resize([image_size, image_size])]
        if augment:
            pixels.append(v2.RandomAffine(15, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=10))
    elif name == "image_folder":
        source = _image_folder(_needed_root(name, root), split)
        labels = source.targets
        if augment:
            pixels = [v2.RandomResizedCrop(image_size, scale=(0.5, 1.0)), v2.RandomHorizontalFlip()]
        else:
            pixels = [v2.Resize(image_size * 8 // 7), v2.CenterCrop(image_size)]
        pixels += to_tensor
    else:
        source = _cifar(name, _needed_root(name, root), split)
        labels = source.targets
        pixels = [v2.Resize([image_size, image_size])]
        if augment:
            pad = image_size // 8
            pixels += [
                v2.RandomCrop(image_size, padding=pad, padding_mode="reflect"),
                v2.RandomHorizontalFlip(),
            ]
        pixels += to_tensor
    transform = v2.Compose([*pixels, v2.Normalize(list(mean), list(std))])
    return LabelledImages(source, labels, transform, sorted(set(labels)) if classes is None else classes)


def _digits(split: Split, split_seed: int) -> tuple[list[tuple[Tensor]], list[int]]:
    """Images [3, 8, 8] in [0, 1] of one split of scikit-learn's digits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images / bunch.images.max()).float()
    parts = train_test_split(
        range(len(images)), test_size=0.2, stratify=bunch.target, random_state=split_seed
    )
    chosen = sorted(parts[0] if split == "train" else parts[1])
    return [(images[i].expand(3, 8, 8),) for i in chosen], [int(bunch.target[i]) for i in chosen]


def _needed_root(name: str, root: Path | None) -> Path:
    if root is None:
        raise DataError(f"data.root is not set: {name} needs the folder that holds its files")
    return root


def _cifar(name: str, root: Path, split: Split) -> tv.CIFAR10:
    reader = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[name]
    try:
        # torchvision compares every file with a known checksum before it reads it.
        return reader(str(root), train=split == "train", download=False)
    except RuntimeError as error:
        folder = root / reader.base_folder
        raise DataError(
            f"{folder}: {name} is missing or damaged; unpack {reader.filename} into {root} so that "
            f"{folder / reader.train_list[0][0]} exists"
        ) from error


def _image_folder(root: Path, split: Split) -> tv.ImageFolder:
    folders = [root / "train"] if split == "train" else [root / "test", root / "val"]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        tried = " and ".join(str(f) for f in folders)
        raise DataError(f"{tried}: no such folder; put the images of each class into {folders[0]}/CLASS/")
    try:
        images = tv.ImageFolder(str(folder))
    except FileNotFoundError as error:  # no class folder, or one without an image
        raise DataError(f"{folder}: {error}; put the images of each class into {folder}/CLASS/") from error
    if split == "test":
        # Labels are places in the sorted class names, so both splits must have the same names.
        known = sorted(f.name for f in (root / "train").glob("*") if f.is_dir())
        if known and known != images.classes:
            differing = ", ".join(sorted(set(known) ^ set(images.classes)))
            raise DataError(
                f"{folder} and {root / 'train'} must have the same class folders; these differ: {differing}"
            )
    return images
