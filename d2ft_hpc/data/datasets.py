"""Labelled images as training and evaluation read them: a part of a source, with its transforms."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from d2ft_hpc.config import DataConfig
from d2ft_hpc.data.images import EncodedImages, PixelImages, Source
from d2ft_hpc.data.sources import open_source
from d2ft_hpc.data.subsets import training_and_validation
from d2ft_hpc.data.transforms import (
    DRAWS,
    Augmentation,
    BatchTransform,
    Crop,
    Cut,
    Entropy,
    ImageSize,
    SampleTransform,
    timm_transform,
    uniform_draws,
)
from d2ft_hpc.errors import DataError

_LOOKED_AT = 1000
"""Images, in a second or a few."""

Split = Literal["train", "validation", "test"]

SMALL_PIXELS = 64
"""Images up to this side usually show one object that fills them, so they are shifted; larger ones are cropped."""
_MEASURED = 16
"""How many images of a split are looked at to tell how large all are."""


class RawBatch(NamedTuple):
    """Samples after stage 1 (see transforms.py)."""

    images: Tensor
    """uint8 or float32 [sample, 3, height, width]."""
    labels: Tensor
    """int64 [sample]."""
    draws: Tensor
    """float32 [sample, DRAWS] in [0, 1)."""


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Some images of a source with labels 0..num_classes-1."""

    def __init__(
        self,
        source: Source,
        indices: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        class_names: tuple[str, ...],
        of_sample: SampleTransform | None,
        of_batch: BatchTransform | None,
        full_size: ImageSize,
    ) -> None:
        """labels: of `indices`; class_names: by label. of_sample None: the images are pixels of one size and go to
        stage 2 as they are. of_batch None: what `of_sample` returns is normalised already."""
        self._images, self._indices = source.images, indices
        self.remark = source.remark
        """What people should know about it, one sentence; may be empty."""
        self._labels = labels
        self._of_sample, self._of_batch, self._full_size = of_sample, of_batch, full_size
        self.class_names = class_names

    @property
    def labels(self) -> list[int]:
        labels: list[int] = self._labels.tolist()
        return labels

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def need_a_processor(self) -> bool:
        """Whether each image is decoded, or transformed one by one, before it goes to the device."""
        return self._of_sample is not None

    def look_at_some(self) -> None:
        """Raises DataError if one of a sample of images is of an unknown kind or cut short; no image is decoded as a
        whole. Checking all images of a large data set would take as long as an epoch; faults of the others show when
        they are read.
        """
        if isinstance(self._images, EncodedImages):
            for index in evenly_spaced(len(self), _LOOKED_AT):
                self._images.look_at(int(self._indices[index]))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """A finished image, float32 [3, image_size, image_size], drawn from torch's own generator, and its label."""
        images, labels = self.finish(self.read([index], [[int(torch.randint(2**62, ()))]]))
        return images[0], int(labels[0])

    def read(
        self, indices: Sequence[int], entropies: Sequence[Entropy] | None, size: ImageSize | None = None
    ) -> RawBatch:
        """Stage 1; `entropies` decide each sample's random draws (None: nothing is drawn, as in evaluation).

        size: of images that are cut here, None: full size. Those that are cut in stage 2, or by timm, have full size.
        """
        rows = self._indices[np.asarray(indices, np.int64)]
        labels = torch.from_numpy(self._labels[np.asarray(indices, np.int64)])
        draws = np.zeros((len(rows), DRAWS), np.float32)
        if entropies is not None:
            draws = np.stack([uniform_draws(entropy) for entropy in entropies])
        if self._of_sample is None:
            assert isinstance(self._images, PixelImages)
            images = self._images.take(rows)
        else:
            images = torch.stack(
                [
                    self._of_sample(self._images.tensor(int(row)), entropy, size or self._full_size)
                    for row, entropy in zip(rows, entropies or repeat(None, len(rows)), strict=True)
                ]
            )
        return RawBatch(images, labels, torch.from_numpy(draws))

    def finish(self, batch: RawBatch) -> tuple[Tensor, Tensor]:
        """Stage 2, on the batch's device: images float32 [sample, 3, image_size, image_size] and labels."""
        if self._of_batch is None:
            return batch.images, batch.labels
        return self._of_batch(batch.images, batch.draws), batch.labels


def open_split(
    config: DataConfig,
    split: Split,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    *,
    seed: int = 0,
) -> LabelledImages:
    """The images of a data set (see `open_source` for names and roots).

    split: "validation" is `validation_fraction` of the training set, held out of it; "train" is `train_fraction` of
    the rest. Both are stratified and decided by `seed` alone. `classes[k]` becomes label k.
    Pixels in [0, 1] become (pixel - mean) / std per channel.
    Raises DataError if files are absent or damaged, or a class would have no image.
    """
    root, classes = None if config.root is None else Path(config.root), config.classes
    source = open_source(config.name, root, "test" if split == "test" else "train")
    kept = _label_of(source, classes)
    chosen = np.flatnonzero(kept >= 0)
    if split != "test":
        parts = training_and_validation(
            kept[chosen],
            train_fraction=config.train_fraction,
            validation_fraction=config.validation_fraction,
            seed=seed,
        )
        chosen = chosen[parts[0 if split == "train" else 1]]
        if not len(chosen):
            raise DataError("data.validation_fraction=0 leaves no validation split: set it, such as 0.1")
    return LabelledImages(
        source,
        chosen,
        kept[chosen],
        source.class_names if classes is None else tuple(source.class_names[each] for each in classes),
        *_transforms(source, config, split == "train", tuple(mean), tuple(std)),
        (config.image_size, config.image_size),
    )


def _label_of(source: Source, classes: Sequence[int] | None) -> npt.NDArray[np.int64]:
    """The label of each image of the source, -1 for those of classes that are not kept."""
    if classes is None:
        return source.labels
    present = set(np.unique(source.labels).tolist())
    absent = sorted(set(classes) - present)
    if absent or len(set(classes)) < len(classes):
        fault = f"no image of {absent}" if absent else "a class named twice"
        raise DataError(
            f"data.classes = {list(classes)}: {fault}; the data set has the classes {sorted(present)}: "
            "choose each at most once"
        )
    new_label = np.full(len(source.class_names), -1, np.int64)
    new_label[list(classes)] = np.arange(len(classes))
    return new_label[source.labels]


def evenly_spaced(length: int, most: int) -> list[int]:
    """At most this many indices at equal distances, so that they cover all classes of a data set that is sorted by
    class."""
    chosen: list[int] = np.linspace(0, length - 1, min(length, most), dtype=int).tolist()
    return chosen


def _automatic(name: str, source: Source) -> Augmentation:
    if name == "digits":
        return "none"
    images = source.images
    if isinstance(images, PixelImages):
        return "shift" if max(images.size) <= SMALL_PIXELS else "resized_crop"
    sides = []
    for index in evenly_spaced(len(images), _MEASURED):
        with suppress(DataError):  # which is told where the image is needed
            sides.append(max(images.size(index)))
    return "shift" if sides and max(sides) <= SMALL_PIXELS else "resized_crop"


def _transforms(
    source: Source, config: DataConfig, training: bool, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[SampleTransform | None, BatchTransform | None]:
    augment = _automatic(config.name, source) if config.augment == "auto" else config.augment
    if training and augment == "timm":
        return timm_transform(config.image_size, mean, std, config.transform_options), None
    crop: Crop = "whole"
    if augment in ("resized_crop", "timm"):
        crop = "random" if training else "central"
    shift = training and augment == "shift"
    flip = training and augment in ("shift", "resized_crop")
    if isinstance(source.images, PixelImages):
        return None, BatchTransform(config.image_size, mean, std, crop, shift, flip)
    return Cut(crop), BatchTransform(None, mean, std, "whole", shift, flip)
