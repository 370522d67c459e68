"""WebDataset's shards: tar files in which KEY.jpg (or another image) is followed by KEY.cls, its class as a number."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2ft_hpc.data.decoding import endings
from d2ft_hpc.data.images import EncodedImages, MappedArray, Source, checked_labels, numbered_classes
from d2ft_hpc.data.shards import shards_of
from d2ft_hpc.errors import DataError
from d2ft_hpc.extras import cannot_import

_LABEL = "cls"
_MOST_DIGITS = 18
"""Of a class; more would not fit into 64 bits."""


def open_webdataset(root: Path, split: str) -> Source:
    """One split: of the tar files below `root` that are named by it (`train-0000.tar`, `train/*.tar`).

    The headers of all shards are read here, the images where they lie, when they are asked for. Other members, such as
    KEY.json or KEY.pyd, are not read at all.

    Raises DataError if `webdataset` is missing, or the shards are absent, damaged or lack images or classes.
    """
    try:
        from webdataset.tariterators import group_by_keys
    except ImportError as error:
        raise DataError(f"data.name=webdataset: {cannot_import(error, 'webdataset', 'webdataset')}") from None
    files = shards_of(root, split, (".tar",))
    shards = tuple(MappedArray(file, 0, (file.stat().st_size,), "|u1") for file in files)
    places, labels, names = [], [], []
    for index, (file, shard) in enumerate(zip(files, shards, strict=True)):
        try:
            for sample in group_by_keys(_members(file)):
                name, (start, size) = _image_of(sample)
                labels.append(_label_of(sample, shard))
                places.append((index, start, size))
                names.append(name)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        except Exception as error:  # tarfile and group_by_keys raise many kinds of errors for damaged files
            told = " ".join(str(error.args[0] if error.args else error).split())
            raise DataError(f"{file}: cannot be read ({told[:200]}); make the shard again") from error
    if not places:
        raise DataError(f"{files[0]}: holds no sample; a sample is KEY.jpg and KEY.{_LABEL}")
    blobs = ShardBlobs(shards, np.array(places, np.int64), tuple(names), tuple(map(str, files)))
    numbers = np.array(labels)
    try:
        classes = numbered_classes(numbers)
        return Source(EncodedImages(blobs), checked_labels(numbers, len(blobs), classes), classes)
    except DataError as error:
        raise DataError(f"{root}: {error}") from error


@dataclass(frozen=True)
class ShardBlobs:
    """Encoded images in tar files."""

    shards: tuple[MappedArray, ...]
    places: npt.NDArray[np.int64]
    """[image, 3]: shard, first byte, bytes."""
    members: tuple[str, ...]
    """[image], in their shard."""
    files: tuple[str, ...]
    """[shard], for messages."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> bytes:
        shard, start, size = self.places[index].tolist()
        content: bytes = self.shards[shard][start : start + size].tobytes()
        return content

    def name(self, index: int) -> str:
        return f"{self.members[index]} in {self.files[self.places[index, 0]]}"


def _members(file: Path) -> Iterator[dict[str, Any]]:
    """The members as webdataset's own iterator over a tar file gives them, but with a place in the file instead of
    the content."""
    with tarfile.open(file, "r:") as tar:
        end = file.stat().st_size
        for member in tar:
            if member.isreg() and not member.name.startswith("__"):
                if member.offset_data + member.size > end or member.issparse():
                    raise DataError(f"{member.name} is cut short; make the shard again")
                place = (member.offset_data, member.size)
                yield {"fname": member.name, "data": place, "__url__": str(file)}
            tar.members = []  # type: ignore[attr-defined]  # which it keeps otherwise


def _image_of(sample: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
    """Member and place of a sample's one image."""
    kinds = [each for each in sample if f".{each.rpartition('.')[2]}" in endings()]
    if len(kinds) != 1:
        raise DataError(
            f"sample {sample['__key__']} holds {len(kinds)} images; each needs one, such as KEY.jpg"
        )
    return f"{sample['__key__']}.{kinds[0]}", sample[kinds[0]]


def _label_of(sample: Mapping[str, Any], shard: MappedArray) -> int:
    key = sample["__key__"]
    if _LABEL not in sample:
        raise DataError(f"sample {key} has no {key}.{_LABEL}, its class as a whole number from 0")
    start, size = sample[_LABEL]
    text = shard[start : start + min(size, _MOST_DIGITS + 2)].tobytes().strip()
    if not text.isdigit() or len(text) > _MOST_DIGITS:
        raise DataError(f"{key}.{_LABEL} holds {text!r}: write the class as a whole number from 0")
    return int(text)
