"""Which files of a folder are images: `CLASS/*`, as deep as it goes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from d2ft_hpc.data.decoding import endings
from d2ft_hpc.data.images import EncodedImages, FileBlobs, Source
from d2ft_hpc.errors import DataError

_STRAY = {"thumbs.db", "desktop.ini"}
"""Files that systems leave in folders; they are passed over, like hidden ones."""
_TOLD_ENDINGS = 5


def class_names(folder: Path) -> tuple[str, ...]:
    """The class folders, sorted. Raises DataError if the folder cannot be read."""
    return tuple(sorted(entry.name for entry in _entries(folder) if entry.is_dir()))


def class_folders(folder: Path) -> Source:
    """Each class's images, which are the files with endings that PIL reads; the remark says how many files were left
    out, and which.

    Raises DataError if there is no class, a class has no image, or something is neither a file nor a folder: a broken
    link, a link to a folder above it, a pipe.
    """
    names = class_names(folder)
    if not names:
        raise DataError(f"{folder}: has no folders; put the images of each class into {folder}/CLASS/")
    files: list[Path] = []
    labels: list[int] = []
    # Images beside the class folders have no label.
    left_out = Counter(_kind(entry.name) for entry in _entries(folder) if not entry.is_dir())
    for label, name in enumerate(names):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{folder}/{name!r}: the class's name is not UTF-8; rename the folder") from None
        inside = files_below(folder / name)
        images = [path for path in inside if _kind(path.name) in endings()]
        others = Counter(_kind(path.name) for path in inside) - Counter(_kind(path.name) for path in images)
        if not images:
            found = f" but {_told(others)}" if others else ""
            raise DataError(
                f"{folder / name}: holds no image{found}; put images there (PNG or JPEG), or remove the folder"
            )
        files += images
        labels += [label] * len(images)
        left_out += others
    remark = ""
    if left_out:
        remark = (
            f"{folder}: left out {_told(left_out)}: no images that are read, or not in a class's folder; convert them "
            "to PNG or JPEG, or remove them"
        )
    return Source(EncodedImages(FileBlobs(tuple(files))), np.array(labels, np.int64), names, remark)


def files_below(folder: Path) -> list[Path]:
    """All files except hidden and stray ones, sorted by folder, then by name. Raises DataError as `class_folders`."""
    found = []
    pending = [folder]
    while pending:
        inner = pending.pop()
        for entry in _entries(inner):
            if entry.is_dir():
                if entry.is_symlink() and inner.resolve().is_relative_to(Path(entry.path).resolve()):
                    raise DataError(f"{entry.path}: leads back to a folder above it; remove the link")
                pending.append(Path(entry.path))
            elif entry.is_file():
                found.append((str(inner), entry.name))
            else:
                raise DataError(f"{entry.path}: neither a file nor a folder, or a broken link; remove it")
    return [Path(inner, name) for inner, name in sorted(found)]


def _entries(folder: Path) -> Iterable[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [e for e in entries if not e.name.startswith(".") and e.name.lower() not in _STRAY]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}; give yourself the right to") from error


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no ending"


def _told(kinds: Counter[str]) -> str:
    counts = [f"{count} {kind}" for kind, count in kinds.most_common(_TOLD_ENDINGS)]
    more = ", ..." if len(kinds) > _TOLD_ENDINGS else ""
    total = sum(kinds.values())
    return f"{total} file{'s' * (total > 1)} ({', '.join(counts)}{more})"
