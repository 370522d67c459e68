"""Which files below a folder make up a split, by their names: `train/*.tar`, `data/train-00000-of-00002.parquet`."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from d2ft_hpc.data.folders import files_below
from d2ft_hpc.errors import DataError

WORDS = {"train": ("train",), "test": ("test", "validation", "val", "valid")}
"""The words that may name a split's files or folders; if there are files of several, the first word counts."""
_SPLIT_OF = {word: (split, rank) for split, words in WORDS.items() for rank, word in enumerate(words)}


def shards_of(root: Path, split: str, endings: Collection[str]) -> list[Path]:
    """The split's files with one of these endings, sorted. The last word of a path that names a split decides.

    Raises DataError if there is none.
    """
    if not root.is_dir():
        raise DataError(f"data.root={root}: no such folder; it is the one that holds the shards")
    found: dict[int, list[Path]] = {}
    for path in files_below(root):
        if path.suffix.lower() in endings:
            words = re.split(r"[^a-z]+", str(path.relative_to(root)).lower())
            of_path = [_SPLIT_OF[word] for word in words if word in _SPLIT_OF]
            if of_path and of_path[-1][0] == split:
                found.setdefault(of_path[-1][1], []).append(path)
    if not found:
        kinds = " or ".join(f"*{ending}" for ending in endings)
        raise DataError(
            f"data.root={root}: no {kinds} file is named by {' or '.join(WORDS[split])}; "
            + (folder_above(root) or f"name files or folders so, such as {split}-0000{next(iter(endings))}")
        )
    return found[min(found)]


def folder_above(root: Path) -> str:
    """What to do where a root is a split's folder; empty if its name says no such thing."""
    return f"set data.root={root.parent}, which holds all splits" if root.name in _SPLIT_OF else ""
