"""Opening HDF5 files of images that may come from anybody: nothing in them leads elsewhere, and nothing is read before
its size is known to fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from d2ft_hpc.data.images import MappedArray
from d2ft_hpc.errors import DataError


@contextmanager
def opened(path: Path, fix: str) -> Iterator[h5py.File]:
    """The file, for reading. Whatever is wrong with it becomes a DataError with its name; fix: what to do then."""
    if not path.is_file():  # a pipe would never end
        raise DataError(f"{path}: {'is no file' if path.exists() else 'no such file'}; {fix}")
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # h5py answers damage with many kinds
        told = str(error) or type(error).__name__
        raise DataError(f"{path}: damaged, or no HDF5 file ({told}); {fix}") from error


def child(group: Any, name: str) -> Any:
    """The object called `name` right in `group`, None if there is none. Raises DataError for a link elsewhere."""
    link = group.get(name, getlink=True) if isinstance(group, h5py.Group) else None
    if link is not None and not isinstance(link, h5py.HardLink):
        raise DataError(
            f"{group.name}/{name} is a link, which is not followed: copy what it stands for into the file"
        )
    return None if link is None else group[name]


def dataset(group: Any, name: str) -> Any:
    """The dataset called `name`, whose values are in the file itself. Raises DataError if there is none, or others."""
    found = child(group, name)
    if not isinstance(found, h5py.Dataset) or found.shape is None:
        raise DataError(f"{group.name} has no array {name!r}")
    if found.is_virtual or found.external:
        raise DataError(f"{found.name} lies in other files: copy it into this one")
    return found


def attribute(item: Any, name: str) -> Any:
    """An attribute's value, None if there is none. Raises DataError if it claims more than its file can hold."""
    if name not in item.attrs:
        return None
    stated = item.attrs.get_id(name)
    if stated.shape is None or stated.get_storage_size() > item.file.id.get_filesize():
        raise DataError(f"the attribute {name!r} is damaged")
    return item.attrs[name]


def mapped(path: Path, group: Any, name: str, dtype: npt.DTypeLike, dimensions: int) -> MappedArray:
    """A dataset as it lies in the file at `path`. Raises DataError if it is not stored there in one piece, without
    filters, in this dtype and with so many axes, all but the first longer than 0."""
    found = dataset(group, name)
    offset = found.id.get_offset()
    if offset is None or found.dtype != dtype or found.ndim != dimensions or 0 in found.shape[1:]:
        raise DataError(
            f"{found.name} is not contiguous {np.dtype(dtype)} [{dimensions} axes]; pack the data set again"
        )
    if offset + found.size * found.dtype.itemsize > path.stat().st_size:
        raise DataError(f"cut short: {found.name} ends beyond the end of the file; copy it again")
    return MappedArray(path, offset, found.shape, found.dtype.str)
