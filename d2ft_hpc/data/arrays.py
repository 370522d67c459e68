"""Images that users keep as arrays in an .npz or HDF5 file of their own, to be packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from d2ft_hpc.data.images import BufferBlobs, EncodedImages, Images, PixelImages, Source
from d2ft_hpc.errors import DataError

FORM = (
    "an HDF5 file needs SPLIT/labels [image] and SPLIT/images uint8 [image, height, width, 3] (or [image, height, "
    "width], or [image, 3, height, width]), or SPLIT/bytes uint8 and SPLIT/offsets int64 [image + 1] of encoded "
    "images; an .npz file needs x_SPLIT and y_SPLIT. SPLIT is train or test"
)


def open_arrays(path: Path, split: str) -> Source:
    """One split of a user's file, read into memory. Raises DataError, with the forms known, if it has no such form."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return _source(_pixels(file[f"x_{split}"]), file[f"y_{split}"], None)
        with h5py.File(path, "r", locking=False) as file:
            group = file[split]
            images: Images
            if "bytes" in group:
                images = EncodedImages(BufferBlobs(group["bytes"][()], group["offsets"][()], str(path)))
            else:
                images = _pixels(group["images"][()])
            return _source(images, group["labels"][()], file.attrs.get("classes"))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read as arrays ({error}): {FORM}") from error


def _pixels(images: Any) -> PixelImages:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(f"images are {images.dtype} {list(images.shape)}: {FORM}")
    if images.ndim == 3:
        return PixelImages(np.repeat(images[:, None], 3, axis=1))
    if images.shape[-1] == 3:
        images = images.transpose(0, 3, 1, 2)
    if images.shape[1] != 3:
        raise DataError(f"images are uint8 {list(images.shape)}: {FORM}")
    return PixelImages(np.ascontiguousarray(images))


def _source(images: Images, labels: Any, names: Any) -> Source:
    labels = np.asarray(labels).reshape(-1)
    if labels.dtype.kind not in "iu" or len(labels) != len(images) or labels.min(initial=0) < 0:
        raise DataError(f"{len(labels)} labels of type {labels.dtype} for {len(images)} images: {FORM}")
    num_classes = int(labels.max(initial=-1)) + 1
    texts = [
        name.decode() if isinstance(name, bytes) else str(name)
        for name in (names if names is not None else [])
    ]
    if texts and len(texts) < num_classes:
        raise DataError(f"{len(texts)} class names for labels up to {num_classes - 1}")
    return Source(images, labels.astype(np.int64), tuple(texts or map(str, range(num_classes))))
