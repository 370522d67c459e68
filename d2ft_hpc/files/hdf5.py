"""Reading HDF5 without trusting it.

A file may come from anybody, so nothing in it is followed blindly: links and virtual datasets are refused, external
storage, references, compound types and all filters but gzip and shuffle too. What an array takes in memory is known
before it is allocated, and unpacked here piece by piece, since the library unpacks a piece to whatever size its stream
has. What is not ours raises RefusedError; the library raises OSError, RuntimeError, ValueError, TypeError or KeyError.

What cannot be caught is a fault inside the library, which runs in this process: metadata that were damaged on purpose,
checksums included, may still crash it.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import re
import stat
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from d2ft_hpc.errors import D2ftError
from d2ft_hpc.files.untrusted import RefusedError
from d2ft_hpc.safe_text import shortened

Scalar = str | bool | int | float

_FREE_BYTES = 1 << 30
_BYTES_PER_STORED = 64
"""Real data seldom pack better, and then by far not all of a large file."""
_LEAST_PIECE_BYTES = 1 << 10
_FREE_PIECES = 1 << 16
"""A second's work, however small the pieces are: labels, or small images, one by one."""
_MOST_ATTRIBUTES = 1 << 10
_MOST_ATTRIBUTE_BYTES = 1 << 20
_OF_DIMENSION_SCALES = ("CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "DIMENSION_LABELS")
_HEAP = b"GCOL\1\0\0\0"
_GZIP, _SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE


class Allowance:
    """How many bytes what is read may take in memory: 1 GiB and 64 for each byte that is stored.

    stored_bytes: size of all files that are read.
    """

    def __init__(self, stored_bytes: int) -> None:
        self._left = _FREE_BYTES + _BYTES_PER_STORED * stored_bytes

    def take(self, nbytes: int, what: str) -> None:
        """Before `nbytes` are allocated. Raises RefusedError where they are too many."""
        self._left -= nbytes
        if self._left < 0:
            raise RefusedError(f"{what} unpacks to far more than its file holds")


def open_file(path: Path) -> h5py.File:
    """The file, for reading. Without a lock: files are only ever replaced as a whole, and some network file systems
    have none. Only a file that this process has opened already is opened in the same way once more, as the library
    asks. Raises RefusedError for what is no regular file (a pipe would hold this process up)."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise RefusedError("it is not a regular file")
    for locking in (False, None):
        try:
            return h5py.File(path, "r", locking=locking)
        except OSError as error:
            if "flag values don't match" not in str(error):
                raise
    return h5py.File(path, "r", locking=True)


@contextmanager
def opened(path: Path, kind: type[D2ftError], fix: str) -> Iterator[h5py.File]:
    """The file, for reading. Whatever is wrong with it becomes one line of `kind` with its name; fix: what to do
    then."""
    if not path.is_file():  # a pipe would never end
        raise kind(f"{path}: {'is no file' if path.exists() else 'no such file'}; {fix}")
    try:
        with open_file(path) as file:
            yield file
    except kind as error:
        raise kind(f"{path}: {error}") from error
    except RefusedError as error:
        raise kind(f"{path}: {error}; {fix}") from error
    except MemoryError as error:
        raise kind(f"{path}: takes more memory than there is ({reason(error)})") from error
    except Exception as error:  # the library answers damage with many kinds
        raise kind(f"{path}: damaged, or no HDF5 file ({reason(error)}); {fix}") from error


def reason(error: Exception) -> str:
    """What the library means, in one line without its own functions' names."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    told = " ".join(str(error).split()) or type(error).__name__
    inner = _LIBRARY_SAYS.fullmatch(told)
    return shortened(inner[1] if inner else told)


_LIBRARY_SAYS = re.compile(r"(?:Unable|Can't) to? ?[\w ]+\((.*)\)", re.DOTALL)


def child(group: Any, name: str) -> Any:
    """The object called `name` right in `group`, None if there is none; links are refused, not followed."""
    if group is None or not isinstance(group, h5py.Group) or not group.id.links.exists(name.encode()):
        return None
    if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise RefusedError(
            f"{group.name.rstrip('/')}/{name} is a link, which is not followed: copy what it stands for into the file"
        )
    return group[name]


def plain_dataset(group: Any, name: str) -> Any:
    """The dataset called `name` right in `group`, whose values are in the file itself, in whatever type and filter."""
    found = child(group, name)
    if not isinstance(found, h5py.Dataset) or found.shape is None:
        raise RefusedError(f"{group.name} has no array {name!r}")
    if found.is_virtual or found.external:
        raise RefusedError(f"{found.name} lies in other files: copy it into this one")
    return found


def offset_of(dataset: Any, dtype: npt.DTypeLike, dimensions: int) -> int:
    """Where in the file the values of a plain dataset begin. Raises RefusedError if they are not stored in one piece,
    without filters, in this dtype and with this number of axes, all but the first longer than 0."""
    offset: int | None = dataset.id.get_offset()
    if offset is None or dataset.dtype != dtype or dataset.ndim != dimensions or 0 in dataset.shape[1:]:
        raise RefusedError(f"{dataset.name} is not contiguous {np.dtype(dtype)} [{dimensions} axes]")
    if offset + dataset.size * dataset.dtype.itemsize > os.path.getsize(dataset.file.filename):
        raise RefusedError(f"cut short: {dataset.name} ends beyond the end of the file")
    return offset


def read_attribute(item: Any, name: str) -> Any:
    """An attribute of any type, None if there is none. Raises RefusedError if it claims more than its file can hold."""
    if name not in item.attrs:
        return None
    stated = item.attrs.get_id(name)
    if stated.shape is None or stated.get_storage_size() > item.file.id.get_filesize():
        raise RefusedError(f"the attribute {name!r} is damaged")
    if stated.dtype.hasobject:
        _check_heaps(Path(item.file.filename))
    return item.attrs[name]


def _check_heaps(path: Path) -> None:
    """Texts of any length lie in global heaps, which have no checksum; the library never ends with an entry without
    length. Reads all of the file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(_HEAP)
        while start >= 0:
            size = int.from_bytes(content[start + 8 : start + 16], "little")
            end = start + size
            if not 16 <= size <= len(content) - start:
                raise RefusedError("a heap of its texts is damaged")
            entry = start + 16
            while entry + 16 <= end:
                index = int.from_bytes(content[entry : entry + 2], "little")
                length = int.from_bytes(content[entry + 8 : entry + 16], "little")
                if index == 0:  # what is free, its own head included
                    entry += length
                    if length < 16:
                        raise RefusedError("a heap of its texts is damaged")
                else:
                    entry += 16 + (length + 7) // 8 * 8
            if entry > end:
                raise RefusedError("a heap of its texts is damaged")
            start = content.find(_HEAP, start + 8)


def read_attributes(item: Any, names: Collection[str] | None = None) -> dict[str, Scalar]:
    """The named attributes, or all but those of dimension scales. Each must be a scalar number or a text of fixed
    length: others lie in HDF5's global heap, which has no checksum and where damage can hold the library up for ever.
    """
    if len(item.attrs) > _MOST_ATTRIBUTES:
        raise RefusedError(f"{item.name} has {len(item.attrs)} attributes")
    values: dict[str, Scalar] = {}
    if names is None:
        names = [name for name in item.attrs if name not in _OF_DIMENSION_SCALES]
    for name in names:
        if name not in item.attrs:
            raise RefusedError(f"{item.name} has no attribute {name!r}")
        attribute = item.attrs.get_id(name)
        dtype = attribute.dtype
        if attribute.shape != () or dtype.kind not in "biufS" or dtype.itemsize > _MOST_ATTRIBUTE_BYTES:
            raise RefusedError(
                f"the attribute {name!r} of {item.name} is not a number or a text of fixed length, below 1 MiB"
            )
        value = item.attrs[name].item()
        values[name] = value.decode() if isinstance(value, bytes) else value
    return values


def read_array(dataset: Any, allowance: Allowance, *, text: bool = False) -> npt.NDArray[Any]:
    """All of a dataset: numbers, or with `text` bytes of fixed length. What it takes is taken from the allowance."""
    check_dataset(dataset, text=text)
    nbytes = math.prod(dataset.shape) * dataset.dtype.itemsize
    if dataset.chunks is not None:
        return _unpacked(dataset, allowance)
    if nbytes > dataset.file.id.get_filesize():
        raise RefusedError(f"{dataset.name} claims to be larger than its file can hold")
    allowance.take(nbytes, dataset.name)
    return np.asarray(dataset[()])


def check_dataset(dataset: Any, *, text: bool = False) -> None:
    """Raises RefusedError if it is no dataset of numbers (with `text`: texts of fixed length), or reading it could
    reach beyond the file."""
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise RefusedError(f"{getattr(dataset, 'name', None)} is not a plain dataset")
    where = dataset.name
    filters = dataset.id.get_create_plist()
    if any(filters.get_filter(i)[0] not in (_GZIP, _SHUFFLE) for i in range(filters.get_nfilters())):
        raise RefusedError(
            f"{where} is filtered by something else than gzip: store it anew, such as by h5repack -f GZIP=4"
        )
    if dataset.shape is None or dataset.dtype.kind not in ("S" if text else "biuf"):
        raise RefusedError(f"{where} is of type {dataset.dtype}")


def _unpacked(dataset: Any, allowance: Allowance) -> npt.NDArray[Any]:
    """A dataset in pieces (chunks), each of them unpacked to the size that it must have."""
    where, shape, piece, dtype = dataset.name, dataset.shape, dataset.chunks, dataset.dtype
    counts = [-(-size // step) for size, step in zip(shape, piece, strict=True)]
    piece_bytes = math.prod(piece) * dtype.itemsize
    padded = math.prod(counts) * piece_bytes
    allowance.take(padded, where)
    if math.prod(counts) > _FREE_PIECES + padded // _LEAST_PIECE_BYTES:
        raise RefusedError(f"{where} is cut into too many pieces")
    stored_type = dataset.id.get_type()
    if dtype.kind != "S" and not h5py.h5t.py_create(dtype).equal(stored_type):
        raise RefusedError(f"{where} is of an unusual type")
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    whole = np.empty(shape, dtype)
    for place in itertools.product(*map(range, counts)):
        start = tuple(index * step for index, step in zip(place, piece, strict=True))
        stored = dataset.id.get_chunk_info_by_coord(start)
        if stored.byte_offset is None or stored.size > piece_bytes + piece_bytes // 100 + 1024:
            raise RefusedError(f"{where} lacks a piece, or has one that is too large")
        skipped, content = dataset.id.read_direct_chunk(start)
        for index in reversed(range(len(filters))):
            if not skipped >> index & 1:
                unpack = _gunzip if filters[index] == _GZIP else _unshuffle
                content = unpack(content, piece_bytes, dtype.itemsize)
        if len(content) != piece_bytes:
            raise RefusedError(f"{where} has a piece of the wrong size")
        values = np.frombuffer(content, dtype).reshape(piece)
        inside = tuple(
            slice(0, min(step, size - first)) for first, step, size in zip(start, piece, shape, strict=True)
        )
        outside = tuple(slice(first, first + step) for first, step in zip(start, piece, strict=True))
        whole[outside] = values[inside]
    return whole


def _gunzip(content: bytes, size: int, _itemsize: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        unpacked = stream.decompress(content, size + 1)
    except zlib.error as error:
        raise RefusedError(f"a compressed piece is damaged: {error}") from None
    if not stream.eof:
        raise RefusedError("a compressed piece does not end where it should")
    return unpacked


def _unshuffle(content: bytes, _size: int, itemsize: int) -> bytes:
    """Undoes the filter that stores the first bytes of all numbers, then the second ones, ..."""
    if len(content) % itemsize:
        raise RefusedError("a piece has a part of a number")
    numbers: npt.NDArray[np.uint8] = np.frombuffer(content, np.uint8).reshape(itemsize, -1).T
    return numbers.tobytes()
