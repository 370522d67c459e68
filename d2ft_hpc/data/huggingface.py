"""Data sets of the library `datasets` on disk: what `DatasetDict.save_to_disk` wrote, or parquet or arrow files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_hpc.data.images import (
    NO_IMAGE,
    EncodedImages,
    Source,
    checked_labels,
    list_of_classes,
    numbered_classes,
)
from d2ft_hpc.data.shards import WORDS, folder_above, shards_of
from d2ft_hpc.errors import DataError
from d2ft_hpc.extras import cannot_import

_LABELS = ("label", "labels")
"""Names of label columns. If several columns hold classes, the first of these names is taken."""
_SAVED = "state.json"
"""What `save_to_disk` writes into each split's folder."""


def open_huggingface(root: Path, split: str) -> Source:
    """One split: of `root/train/` and `root/test/` (or `validation/`), as saved, or of parquet or arrow files that are
    named so. Its one column of images holds files' bytes, its one of labels classes or whole numbers.

    Arrow files are mapped; of parquet files `datasets` keeps a copy in its cache. No code of a data set is run.

    Raises DataError if `datasets` is missing, or the files are absent, damaged or hold anything else.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"data.name=huggingface: {cannot_import(error, 'datasets', 'datasets')}") from None
    datasets.disable_progress_bars()
    where, table = _opened(datasets, root, split)
    try:
        image, label = _column_of_images(datasets, table), _column_of_labels(datasets, table)
        names = getattr(table.features[label], "names", None)
        labels = np.asarray(table.with_format("numpy")[label][:])
        blobs = ColumnBlobs(
            table.select_columns([image]).cast_column(image, datasets.Image(decode=False)), image, where
        )
        classes = numbered_classes(labels) if names is None else list_of_classes(names)
        return Source(EncodedImages(blobs), checked_labels(labels, len(blobs), classes), classes)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except Exception as error:  # as below
        raise _unreadable(where, error) from error


@dataclass(frozen=True)
class ColumnBlobs:
    """Encoded images in a column of a table."""

    table: Any
    """datasets.Dataset of the column alone, of structs with `bytes`."""
    column: str
    source: str
    """For messages."""

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> bytes:
        try:
            stored = self.table[int(index)][self.column]
        except Exception as error:  # as below
            raise _unreadable(self.source, error) from error
        if stored is None or stored["bytes"] is None:
            raise DataError(
                f"{self.name(index)} is a path or absent, not an image: save_to_disk puts the files' bytes in"
            )
        return bytes(stored["bytes"])

    def name(self, index: int) -> str:
        return f"image {index} of {self.source}"


def _opened(datasets: Any, root: Path, split: str) -> tuple[str, Any]:
    """What messages call it, and the table."""
    if (root / _SAVED).exists():
        raise DataError(
            f"data.root={root}: one Dataset without splits; "
            + (folder_above(root) or "save both: DatasetDict(train=..., test=...).save_to_disk(FOLDER)")
        )
    saved = next((root / word for word in WORDS[split] if (root / word / _SAVED).exists()), None)
    files = [] if saved else shards_of(root, split, (".parquet", ".arrow"))
    where = str(saved or files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    if len({file.suffix.lower() for file in files}) > 1:
        raise DataError(f"{where}: some are parquet and some arrow; keep one kind of the split's files")
    try:
        if saved:
            table = datasets.load_from_disk(str(saved))
        elif files[0].suffix.lower() == ".arrow":
            table = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
        else:
            table = datasets.Dataset.from_parquet([str(file) for file in files])
    except Exception as error:  # pyarrow, json and datasets raise many kinds of errors for damaged files
        if _is_empty(saved, files):
            raise DataError(f"{where}: {NO_IMAGE}") from None
        raise _unreadable(where, error) from error
    if not len(table):
        raise DataError(f"{where}: {NO_IMAGE}")
    return where, table


def _is_empty(saved: Path | None, files: Sequence[Path]) -> bool:
    """Of a split that `datasets` could not open: whether that is because nothing is in it."""
    from pyarrow import parquet

    try:
        if saved is not None:
            return not json.loads((saved / _SAVED).read_bytes())["_data_files"]
        return not any(parquet.read_metadata(file).num_rows for file in files)
    except Exception:  # damaged
        return False


def _unreadable(where: str, error: Exception) -> DataError:
    told = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{where}: cannot be read by datasets ({told[:200]}); save it again")


def _column_of_images(datasets: Any, table: Any) -> str:
    def holds_images(feature: Any) -> bool:
        if isinstance(feature, dict):  # of parquet files that other programs wrote
            return getattr(feature.get("bytes"), "dtype", "") == "binary"
        return isinstance(feature, datasets.Image)

    return _the_one("images", [n for n, kind in table.features.items() if holds_images(kind)], table, "image")


def _column_of_labels(datasets: Any, table: Any) -> str:
    kinds = table.features.items()
    found = [name for name, kind in kinds if isinstance(kind, datasets.ClassLabel)]
    found = found or [
        name for name, kind in kinds if str(getattr(kind, "dtype", "")).lstrip("u").startswith("int")
    ]
    return _the_one("labels (ClassLabel or whole numbers)", found, table, *_LABELS)


def _the_one(what: str, found: Sequence[str], table: Any, *preferred: str) -> str:
    chosen = found if len(found) == 1 else [name for name in preferred if name in found]
    if not chosen:
        columns = ", ".join(found or table.features)
        fault = f"columns {columns} all hold" if found else f"none of its columns ({columns}) holds"
        raise DataError(f"{fault} {what}: name the one to be used {preferred[0]!r}")
    return chosen[0]
