"""Makes packed files (see packed.py): `d2ft-hpc data pack`."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt
from PIL import Image

from d2ft_hpc.data import decoding
from d2ft_hpc.data.arrays import open_arrays
from d2ft_hpc.data.images import EncodedImages, Images, PixelImages, Source
from d2ft_hpc.data.packed import FORMAT, VERSION, describe
from d2ft_hpc.data.sources import StoredSplit, open_source
from d2ft_hpc.data.workers import loader_of, read_with
from d2ft_hpc.errors import DataError
from d2ft_hpc.files import hdf5
from d2ft_hpc.launch.control import print_line
from d2ft_hpc.safe_text import say

Encoding = Literal["pixels", "original", "jpeg"]
BATCH = 64
_TOLD_LABELS = 5


def pack_by_name(
    name: str,
    root: Path,
    output: Path,
    *,
    encoding: Encoding | Literal["auto"] = "auto",
    size: int | None = None,
    quality: int = 95,
    workers: int = 0,
) -> None:
    """Packs both splits of a data set, as `data.name` and `data.root` name it, or "arrays"; prints what it made.

    See `pack`; "auto" is "original" where images have files of their own and keep their size, else "pixels".
    """
    _check_output(output)
    splits: tuple[StoredSplit, ...] = ("train", "test")
    sources: dict[str, Source] = {
        split: open_arrays(root, split) if name == "arrays" else open_source(name, root, split)
        for split in splits
    }
    _check_labels(sources["train"], sources["test"], root)
    for source in sources.values():
        if source.remark:
            print_line(f"d2ft-hpc: warning: {source.remark}")
    if encoding == "auto":
        files = size is None and all(isinstance(each.images, EncodedImages) for each in sources.values())
        encoding = "original" if files else "pixels"
    if size is not None and encoding == "pixels":
        print_line(
            f"d2ft-hpc: warning: of images that are not square, only the middle {size} x {size} pixels are kept; "
            "--encoding jpeg keeps all"
        )
    pack(sources, output, encoding=encoding, size=size, quality=quality, workers=workers)
    say(describe(output))


def pack(
    splits: Mapping[str, Source],
    output: Path,
    *,
    encoding: Encoding,
    size: int | None = None,
    quality: int = 95,
    workers: int = 0,
) -> None:
    """Writes a packed file, complete or not at all.

    encoding: "pixels" (all images of one size), "original" (the files' own bytes, untouched) or "jpeg" (encoded anew).
    size: shorter side in pixels after resizing; with "pixels" images are also cut to a square.
    quality: of "jpeg". workers: processes that read and encode.

    Raises DataError if `output` exists or cannot be written, an image cannot be read, images for "pixels" differ in
    size, or "original" is asked of images that have no files.
    """
    _check_output(output)
    if encoding == "original" and size is not None:
        raise DataError("--size changes the images: choose --encoding jpeg or pixels with it")
    names = max((source.class_names for source in splits.values()), key=len)
    building = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    flat = building.with_suffix(".flat")
    try:
        with h5py.File(building, "w") as file:
            file.attrs["format"], file.attrs["version"] = np.bytes_(FORMAT), VERSION
            file.attrs["classes"] = np.array([name.encode() for name in names])
            for split, source in splits.items():
                if source.class_names != names[: len(source.class_names)]:
                    raise DataError(f"the classes of {split} are not those of the other split")
                encoder = _Encoder(source.images, encoding, size, quality)
                _write_split(file.create_group(split), source, encoder, flat, workers)
        with open(building, "rb+") as finished:
            os.fsync(finished.fileno())
        os.replace(building, output)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{output}: cannot be written: {hdf5.reason(error)}; choose another file, or make room"
        ) from error
    finally:
        for temporary in (flat, building):
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _check_output(output: Path) -> None:
    if output.exists():
        raise DataError(f"{output}: exists and is not overwritten: remove it or choose another file")
    if not output.parent.is_dir():
        raise DataError(f"{output}: there is no folder {output.parent}; make it, or choose another")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise DataError(f"{output}: {output.parent} cannot be written to; choose another folder")


def _check_labels(train: Source, test: Source, root: Path) -> None:
    """Raises DataError where no image for training has a label that the test has."""
    unknown = np.setdiff1d(test.labels, train.labels)
    if len(unknown):
        first = ", ".join(map(str, unknown[:_TOLD_LABELS])) + ", ..." * (len(unknown) > _TOLD_LABELS)
        raise DataError(
            f"{root}: train and test must have the same classes; test has labels that no image of train has: {first}"
        )


def _write_split(group: Any, source: Source, encoder: _Encoder, flat: Path, workers: int) -> None:
    """The images go to a flat file first: only then is the size of a contiguous dataset known."""
    digest, lengths = hashlib.sha256(), [0]
    shape: tuple[int, ...] | None = None
    images = range(len(source.labels))
    batches = [images[start : start + BATCH] for start in images[::BATCH]]
    with flat.open("wb") as file:
        for batch in read_with(loader_of(encoder, batches, num_workers=workers, persistent=False)):
            for encoded, its_shape in batch:
                shape = shape or its_shape
                if its_shape != shape:
                    raise DataError(
                        f"image {len(lengths) - 1} of {group.name[1:]} has {its_shape} pixels, the first has {shape}: "
                        "choose --size, or --encoding original or jpeg"
                    )
                file.write(encoded)
                digest.update(encoded)
                lengths.append(len(encoded))
    offsets = np.cumsum(np.array(lengths, np.int64))
    written: npt.NDArray[np.uint8] = np.memmap(flat, "u1", "r")
    if shape is None:
        group.create_dataset("bytes", data=written)
        group.create_dataset("offsets", data=offsets)
    else:
        group.create_dataset("pixels", data=written.reshape(-1, 3, *shape))
    group.create_dataset("labels", data=source.labels)
    digest.update(source.labels.astype("<i8").tobytes())
    group.attrs["sha256"] = np.bytes_(digest.hexdigest())


_Encoded = tuple[bytes, tuple[int, int] | None]
"""An image as it will lie in the file, with its (height, width) if it is pixels."""


class _Encoder:
    """Reads and encodes images."""

    def __init__(self, images: Images, encoding: Encoding, size: int | None, quality: int) -> None:
        if encoding == "original" and isinstance(images, PixelImages):
            raise DataError(
                "--encoding original: these images are pixels and have no files; choose pixels or jpeg"
            )
        self._images, self._encoding, self._size, self._quality = images, encoding, size, quality

    def __getitems__(self, indices: Sequence[int]) -> list[_Encoded]:
        return [self._encoded(index) for index in indices]

    def _encoded(self, index: int) -> _Encoded:
        if self._encoding == "original" and isinstance(self._images, EncodedImages):
            return self._images.look_at(index), None
        picture = self._images.picture(index)
        try:
            if self._size is not None:
                picture = _resized(picture, self._size, square=self._encoding == "pixels")
            if self._encoding == "pixels":
                return np.asarray(picture).transpose(2, 0, 1).tobytes(), (picture.height, picture.width)
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=self._quality, subsampling=0)
            return file.getvalue(), None
        except (OSError, ValueError, MemoryError, OverflowError) as error:
            told = str(error) or type(error).__name__
            name = f"image {index}"
            if isinstance(self._images, EncodedImages):
                name = self._images.blobs.name(index)
            raise DataError(
                f"{name}: cannot be encoded ({told}): choose another --size or --encoding"
            ) from error


def _resized(picture: Image.Image, size: int, *, square: bool) -> Image.Image:
    """The shorter side becomes `size`; `square` cuts the longer one to it, in the middle. Raises ValueError if nobody
    could decode the result."""
    scale = size / min(picture.size)
    width, height = (max(round(side * scale), size) for side in picture.size)
    if width * height > decoding.MOST_PIXELS:
        raise ValueError(f"it would become {width} x {height}, more than {decoding.MOST_PIXELS}")
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    if not square:
        return picture
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))
