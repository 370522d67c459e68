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

import h5py
import numpy as np

from d2ft_hpc.data.images import BufferBlobs, EncodedImages, Images, MappedArray, PixelImages, Source
from d2ft_hpc.errors import DataError

FORMAT = "d2ft-hpc images"
VERSION = 1


def open_packed(path: Path, split: str) -> Source:
    """One split of a packed file; its images are read where they lie, when they are asked for.

    Raises DataError if the file is missing, foreign or damaged, or lacks the split.
    """
    with _opened(path) as file:
        if split not in file:
            raise DataError(f"{path}: has no split {split!r}, only {', '.join(file)}")
        group = file[split]
        names = tuple(name.decode() for name in file.attrs["classes"])
        labels = np.asarray(group["labels"][()], np.int64)
        images: Images
        if "pixels" in group:
            images = PixelImages(_mapped(path, group["pixels"], dimensions=4))
        else:
            offsets = np.asarray(group["offsets"][()], np.int64)
            buffer = _mapped(path, group["bytes"], dimensions=1)
            if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] != len(buffer):
                raise DataError(f"{path}: damaged: offsets of {split} do not divide its bytes")
            images = EncodedImages(BufferBlobs(buffer, offsets, str(path)))
    if labels.shape != (len(images),) or not len(labels) or labels.min() < 0 or labels.max() >= len(names):
        raise DataError(
            f"{path}: damaged: {labels.size} labels of {split} do not fit its {len(images)} images in "
            f"{len(names)} classes"
        )
    return Source(images, labels, names)


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """The file, known to be a packed one. Whatever is wrong with it inside becomes a DataError."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("format") != FORMAT:
                raise DataError(f"{path}: not a packed data set; make one by d2ft-hpc data pack")
            if file.attrs.get("version") != VERSION:
                version = file.attrs.get("version")
                raise DataError(f"{path}: packed in version {version}, this program reads {VERSION}")
            yield file
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make it by d2ft-hpc data pack") from None
    except (OSError, LookupError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: not a readable packed data set: {error}") from error


def _mapped(path: Path, dataset: Any, dimensions: int) -> MappedArray:
    offset = dataset.id.get_offset() if isinstance(dataset, h5py.Dataset) else None
    if offset is None or dataset.dtype != np.uint8 or dataset.ndim != dimensions or dataset.external:
        raise DataError(
            f"{path}: {dataset.name} is not contiguous uint8 [{dimensions} axes] in the file itself"
        )
    if offset + dataset.size > path.stat().st_size:
        raise DataError(f"{path}: cut short: {dataset.name} ends beyond the end of the file")
    return MappedArray(path, offset, dataset.shape, "u1")


def describe(path: Path) -> str:
    """Splits, images, classes and form of a packed file, for people. Raises DataError if a checksum does not match."""
    with _opened(path) as file:
        stated = {split: str(group.attrs.get("sha256", "")) for split, group in file.items()}
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
