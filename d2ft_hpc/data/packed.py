"""One HDF5 file for a whole data set: parallel file systems are slow with many small files.

Root attributes: `format`, `version`, `classes` (names, UTF-8 bytes). Groups `train` and `test`, each with `labels`
int64 [image] and the attribute `sha256` (of its images, then its labels), and either

- `pixels` uint8 [image, 3, height, width], or
- `bytes` uint8 [byte] and `offsets` int64 [image + 1]: image i is the JPEG (PNG, ...) file
  bytes[offsets[i]:offsets[i + 1]].

Images are stored contiguously and without filters, so that readers map them: no chunk cache, no locks, and all
processes of a node share one copy in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2ft_hpc.data.images import (
    BufferBlobs,
    EncodedImages,
    Images,
    MappedArray,
    PixelImages,
    Source,
    checked_labels,
    divide,
    list_of_classes,
)
from d2ft_hpc.errors import DataError
from d2ft_hpc.files import hdf5, kinds

FORMAT = kinds.IMAGES
VERSION = 1
_SPLITS = ("train", "test")
_AGAIN = "make it by d2ft-hpc data pack"


def open_packed(path: Path, split: str) -> Source:
    """One split of a packed file; its images are read where they lie, when they are asked for.

    Raises DataError if the file is missing, foreign or damaged, or lacks the split.
    """
    with _opened(path) as file:
        group = hdf5.child(file, split)
        if group is None:
            raise DataError(f"has no split {split!r}, only {', '.join(_splits(file)) or 'none'}; {_AGAIN}")
        names = hdf5.read_attribute(file, "classes")
        if getattr(names, "dtype", np.dtype(float)).kind != "S":
            raise DataError(f"damaged: its `classes` are no list of names, bytes in UTF-8; {_AGAIN}")
        names = list_of_classes(names)
        labels = _mapped(path, group, "labels", np.int64, 1)[:]
        images: Images
        if "pixels" in group:
            pixels = _mapped(path, group, "pixels", np.uint8, 4)
            if pixels.shape[1] != 3:
                raise DataError(
                    f"damaged: pixels of {split} are {list(pixels.shape)}, not [image, 3, height, width]"
                )
            images = PixelImages(pixels)
        else:
            offsets = _mapped(path, group, "offsets", np.int64, 1)[:]
            buffer = _mapped(path, group, "bytes", np.uint8, 1)
            if not divide(offsets, len(buffer)):
                raise DataError(f"damaged: offsets of {split} do not divide its bytes; {_AGAIN}")
            images = EncodedImages(BufferBlobs(buffer, offsets, str(path)))
        try:
            labels = checked_labels(labels, len(images), names)
        except DataError as error:
            raise DataError(f"damaged: {split}: {error}; {_AGAIN}") from error
    return Source(images, labels, names)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, after checking that it is a packed one. Whatever is wrong with it within the block becomes a
    DataError."""
    with hdf5.opened(path, DataError, _AGAIN) as file:
        if other := kinds.other_kind(file, FORMAT):
            raise DataError(f"{other}, not a packed data set; {_AGAIN}")
        if _text(file, "format") != FORMAT:
            raise DataError(f"not a packed data set; {_AGAIN}")
        version = hdf5.read_attribute(file, "version")
        if str(version) != str(VERSION):
            raise DataError(f"packed in version {version}, this program reads {VERSION}; {_AGAIN}")
        yield file


def _text(item: Any, name: str) -> str:
    value = hdf5.read_attribute(item, name)
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _mapped(path: Path, group: Any, name: str, dtype: npt.DTypeLike, dimensions: int) -> MappedArray:
    """A dataset as it lies in the file at `path`, by `hdf5.offset_of`."""
    stored = hdf5.plain_dataset(group, name)
    return MappedArray(path, hdf5.offset_of(stored, dtype, dimensions), stored.shape, stored.dtype.str)


def _splits(file: Any) -> list[str]:
    return [split for split in _SPLITS if hdf5.child(file, split) is not None]


def describe(path: Path) -> str:
    """Describes a packed file's splits, images, classes and form in words. Raises DataError if a checksum does not
    match."""
    with _opened(path) as file:
        stated = {split: _text(file[split], "sha256") for split in _splits(file)}
        if not stated:
            raise DataError(f"holds neither train nor test; {_AGAIN}")
    lines = []
    for split, checksum in stated.items():
        source = open_packed(path, split)
        if isinstance(source.images, PixelImages):
            height, width = source.images.size
            stored, form = source.images.pixels, f"{width} x {height} pixels"
        else:
            assert isinstance(source.images.blobs, BufferBlobs)
            stored, form = source.images.blobs.buffer, "encoded"
        digest = hashlib.sha256()
        step = max((1 << 26) // max(int(np.prod(stored.shape[1:])), 1), 1)
        for start in range(0, len(stored), step):
            digest.update(stored[start : start + step].tobytes())
        digest.update(source.labels.astype("<i8").tobytes())
        if digest.hexdigest() != checksum:
            raise DataError(f"{path}: damaged: {split} does not match its checksum; pack it again")
        size = int(np.prod(stored.shape)) / 1e6
        lines.append(
            f"{split:6} {len(source.labels)} images in {len(source.class_names)} classes, {form}, {size:.1f} MB, "
            f"sha256 {checksum[:16]}"
        )
    return "\n".join(lines)
