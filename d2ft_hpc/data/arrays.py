"""Images that users keep as arrays in a file of their own, to be packed. SPLIT is train or test:

- an .npz file has x_SPLIT (images) and y_SPLIT (labels);
- an HDF5 file has SPLIT/images and SPLIT/labels, or, for encoded images, SPLIT/bytes uint8 and SPLIT/offsets int64
  [image + 1] in place of SPLIT/images; class names may be in its root attribute `classes`.

Images are uint8 0 to 255, [image, height, width, 3], [image, 3, height, width], or grey as [image, height, width] or
[image, height, width, 1]; labels are whole numbers from 0, [image], and test has none that train lacks.

The memory that arrays take is checked against the size of their file before any is allocated, since a file of a few
megabytes can claim any size.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2ft_hpc.data.images import (
    BufferBlobs,
    EncodedImages,
    Images,
    PixelImages,
    Source,
    checked_labels,
    divide,
    list_of_classes,
    numbered_classes,
)
from d2ft_hpc.errors import DataError
from d2ft_hpc.files import hdf5
from d2ft_hpc.files.untrusted import RefusedError
from d2ft_hpc.metering.memory import free_bytes_of_host

_NPZ = "an .npz file needs x_train, y_train, x_test and y_test"
_HDF5 = "an HDF5 file needs images and labels (or bytes, offsets and labels) in groups train and test"
_SHAPE = "images are uint8 [image, height, width, 3], [image, 3, height, width] or [image, height, width]"
_SMALLER = "divide it, or store encoded images"
_OTHER_RANGE = "pixels must be uint8, 0 to 255: scale them by what their range is, such as x * 255 for 0 to 1"


def open_arrays(path: Path, split: str) -> Source:
    """One split of a user's file, read into memory. Raises DataError if the file is not in one of these forms."""
    return _of_npz(path, split) if path.suffix.lower() == ".npz" else _of_hdf5(path, split)


def _of_npz(path: Path, split: str) -> Source:
    if not path.is_file():  # a pipe would never end
        raise DataError(f"{path}: {'is no file' if path.exists() else 'no such file'}; {_NPZ}")
    try:
        with zipfile.ZipFile(path) as file:
            allowance = hdf5.Allowance(path.stat().st_size)
            images, labels = (_member(file, f"{kind}_{split}", allowance) for kind in "xy")
            return _source(_pixels(images), labels, None)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (RefusedError, MemoryError) as error:
        raise DataError(f"{path}: {hdf5.reason(error)}; {_SMALLER}") from error
    except Exception as error:  # zipfile, zlib and numpy raise many kinds of errors for damaged files
        raise DataError(f"{path}: damaged, or no .npz file ({hdf5.reason(error)}); {_NPZ}") from error


def _member(file: zipfile.ZipFile, name: str, allowance: hdf5.Allowance) -> npt.NDArray[Any]:
    if f"{name}.npy" not in file.namelist():
        raise DataError(f"has no array {name!r}: {_NPZ}")
    info = file.getinfo(f"{name}.npy")
    with file.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(member)
        # numpy allocates what the header says before it reads.
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > info.file_size:
            raise DataError(
                f"damaged: {name} claims {list(shape)} {dtype}, which is more than the file holds"
            )
    allowance.take(nbytes, name)
    _check_free_memory(name, nbytes)
    with file.open(info) as member:
        array: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
    return array


def _of_hdf5(path: Path, split: str) -> Source:
    with hdf5.opened(path, DataError, _HDF5) as file:
        group = hdf5.child(file, split)
        if group is None:
            raise DataError(f"has no group {split!r}: {_HDF5}")
        allowance = hdf5.Allowance(file.id.get_filesize())
        images: Images
        if hdf5.child(group, "bytes") is not None:
            buffer, offsets = (_array(group, name, allowance) for name in ("bytes", "offsets"))
            if buffer.dtype != np.uint8 or buffer.ndim != 1 or not divide(offsets, len(buffer)):
                raise DataError(
                    f"offsets of {split} do not divide its bytes: they rise from 0 to their number, int64"
                )
            images = EncodedImages(BufferBlobs(buffer, offsets, str(path)))
        else:
            images = _pixels(_array(group, "images", allowance))
        return _source(images, _array(group, "labels", allowance), hdf5.read_attribute(file, "classes"))


def _array(group: Any, name: str, allowance: hdf5.Allowance) -> npt.NDArray[Any]:
    stored = hdf5.plain_dataset(group, name)
    if stored.dtype.kind not in "biuf":
        raise DataError(f"{stored.name} is of type {stored.dtype}: store numbers")
    _check_free_memory(stored.name, stored.size * stored.dtype.itemsize)
    return hdf5.read_array(stored, allowance)


def _check_free_memory(name: str, nbytes: int) -> None:
    free = free_bytes_of_host(Path("/"))
    if nbytes > free:
        raise DataError(
            f"{name} takes {nbytes / 1e9:.1f} GB in memory, and {free / 1e9:.1f} GB are free; {_SMALLER}"
        )


def _pixels(images: npt.NDArray[Any]) -> PixelImages:
    if images.dtype != np.uint8:
        raise DataError(f"images are {images.dtype} {list(images.shape)}; {_OTHER_RANGE}")
    if images.ndim == 4 and images.shape[-1] == 3:
        images = images.transpose(0, 3, 1, 2)
    elif images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim == 3:
        images = np.broadcast_to(images[:, None], (len(images), 3, *images.shape[1:]))
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise DataError(f"images are uint8 {list(images.shape)}: {_SHAPE}")
    return PixelImages(images)


def _source(images: Images, labels: npt.NDArray[Any], names: Any) -> Source:
    labels = labels.reshape(-1)
    classes = numbered_classes(labels) if names is None else list_of_classes(names)
    return Source(images, checked_labels(labels, len(images), classes), classes)
