"""Where images lie: as pixels in an array, or encoded (JPEG, PNG, ...) in files or in one mapped buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from d2ft_hpc.data import decoding
from d2ft_hpc.errors import DataError

Read = TypeVar("Read")


class MappedArray:
    """A read-only array inside a file. Each process maps it anew, and all share the system's cache of the file."""

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], dtype: str) -> None:
        self._path, self._offset, self._dtype = path, offset, dtype
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        return np.asarray(self._mapped[key])

    @cached_property
    def _mapped(self) -> npt.NDArray[Any]:
        try:
            return np.memmap(self._path, self._dtype, "r", self._offset, self.shape)
        except (OSError, ValueError) as error:
            raise DataError(f"{self._path}: cannot be read: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedArray, (self._path, self._offset, self.shape, self._dtype)


@dataclass(frozen=True)
class PixelImages:
    """Images of one size, as pixels: uint8 0 to 255 or float32 0 to 1, [image, 3, height, width]."""

    pixels: npt.NDArray[Any] | MappedArray

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.pixels.shape[2], self.pixels.shape[3]

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Tensor:
        """The images [index, 3, height, width] as a copy."""
        return torch.from_numpy(self.pixels[np.asarray(indices)])

    def tensor(self, index: int) -> Tensor:
        """Image `index` [3, height, width]."""
        return self.take([index])[0]

    def picture(self, index: int) -> Image.Image:
        pixels = self.pixels[index]
        if pixels.dtype != np.uint8:
            pixels = (pixels * 255).round().astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


class Blobs(Protocol):
    """Encoded images, one bytes object each."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes: ...

    def name(self, index: int) -> str:
        """For messages."""
        ...


@dataclass(frozen=True)
class EncodedImages:
    """Images of any size and format that PIL reads, decoded as decoding.py says."""

    blobs: Blobs

    def __len__(self) -> int:
        return len(self.blobs)

    def tensor(self, index: int) -> Tensor:
        """Image `index` in RGB, uint8 [3, height, width]. Raises DataError if it cannot be decoded."""
        return torch.from_numpy(np.array(self.picture(index))).permute(2, 0, 1)

    def picture(self, index: int) -> Image.Image:
        """The same as a PIL image."""
        return self._named(index, decoding.decode)

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) of image `index`, as its head says. Raises DataError if it is of no kind that is read."""
        return self._named(index, decoding.size)

    def look_at(self, index: int) -> bytes:
        """Its bytes. Raises DataError if image `index` is of no kind that is read, or cut short."""
        self._named(index, decoding.look)
        return self.blobs[index]

    def _named(self, index: int, read: Callable[[bytes], Read]) -> Read:
        data = self.blobs[index]
        try:
            return read(data)
        except DataError as error:
            raise DataError(f"{self.blobs.name(index)}: {error}") from error


Images = PixelImages | EncodedImages


@dataclass(frozen=True)
class FileBlobs:
    """A file for each image."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bytes:
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise DataError(f"{self.paths[index]}: cannot be read: {error}") from error

    def name(self, index: int) -> str:
        return str(self.paths[index])


@dataclass(frozen=True)
class BufferBlobs:
    """All images in one buffer: image i is bytes [offsets[i], offsets[i + 1])."""

    buffer: npt.NDArray[np.uint8] | MappedArray
    offsets: npt.NDArray[np.int64]
    source: str
    """The file's name, for messages."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.buffer[int(self.offsets[index]) : int(self.offsets[index + 1])].tobytes()

    def name(self, index: int) -> str:
        return f"image {index} of {self.source}"


@dataclass(frozen=True)
class Source:
    """One split of a data set as it is stored."""

    images: Images
    labels: npt.NDArray[np.int64]
    """[image], 0 to number of classes - 1."""
    class_names: tuple[str, ...]
    remark: str = ""
    """What people should know, one sentence."""


MOST_CLASSES = 1_000_000
NO_IMAGE = "holds no image; each split needs some"


def checked_labels(
    labels: npt.NDArray[Any], images: int, class_names: Sequence[str]
) -> npt.NDArray[np.int64]:
    """Labels, int64 [image]. Raises DataError, without a name, if they do not fit the number of images or the
    classes."""
    if not images:
        raise DataError(NO_IMAGE)
    if labels.dtype.kind not in "iu" or labels.shape != (images,):
        raise DataError(
            f"{labels.size} labels of type {labels.dtype} for {images} images: each needs one whole number"
        )
    least, most = int(labels.min()), int(labels.max())
    if least < 0:
        raise DataError(f"labels are {least} to {most}: they must not be negative; number the classes from 0")
    if most >= len(class_names):
        raise DataError(
            f"labels are {least} to {most}, and there are {len(class_names)} classes, counted from 0"
        )
    return labels.astype(np.int64)


def list_of_classes(names: Any) -> tuple[str, ...]:
    """Class names from a list or an array. Raises DataError for a text, which is not a list of its characters."""
    if isinstance(names, (str, bytes)) or np.ndim(names) != 1 or not len(names):
        raise DataError(f"class names are {str(names)[:60]!r}: make it a list, such as ['cat', 'dog']")
    try:
        return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    except UnicodeDecodeError as error:
        raise DataError(f"class names are not in UTF-8: {error}") from error


def numbered_classes(labels: npt.NDArray[Any]) -> tuple[str, ...]:
    """Names of classes that have none: their numbers. Raises DataError, without a name, if there are too many."""
    num_classes = int(labels.max(initial=0)) + 1 if labels.dtype.kind in "iu" else 1
    if num_classes > MOST_CLASSES:
        raise DataError(f"labels go up to {num_classes - 1}: number the classes from 0")
    return tuple(map(str, range(num_classes)))


def divide(offsets: npt.NDArray[Any], nbytes: int) -> bool:
    """Whether offsets int64 [image + 1] cut a buffer of this size into images."""
    return (
        offsets.dtype == np.int64
        and offsets.ndim == 1
        and len(offsets) > 0
        and offsets[0] == 0
        and bool((offsets[1:] >= offsets[:-1]).all())
        and offsets[-1] == nbytes
    )
