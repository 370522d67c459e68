"""Whole files or none: a kill, a full disk or a power cut in the middle of a write leaves the old content.

A file is written under another name, put on disk, renamed, and so is its folder: without that last step a power cut
can undo the rename, and without the first it can leave an empty file under the new name.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
"""Errors of file systems that cannot flush a folder, or of processes that may not read it."""


@contextmanager
def replaced(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Gives another name beside `path` to write to. After the block the file is on disk as `path`; after an exception
    in it nothing has changed.

    shared: other processes may write the same file at the same time, and the last one wins. Else a kill leaves at
    most one other file, which the next write replaces.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp" if shared else f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(path: Path, content: str | bytes | memoryview, *, shared: bool = False) -> None:
    """Makes `content` (text as UTF-8) that of the file. `shared` as in `replaced`. Raises OSError."""
    with replaced(path, shared=shared) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def append_line(path: Path, line: str) -> None:
    """Adds a line that is on disk when this returns; one that a kill cut short stays a line of its own."""
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def replace_folder(building: Path, folder: Path) -> None:
    """Puts all of `building` on disk and gives it the name `folder`, whose old content is removed."""
    for path in (building, *building.rglob("*")):
        sync(path)
    remove_folder(folder)
    os.replace(building, folder)
    sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Removes it; a kill in between leaves no half of it under its name."""
    if folder.exists():
        removing = folder.with_suffix(".removing")
        shutil.rmtree(removing, ignore_errors=True)
        os.replace(folder, removing)
        shutil.rmtree(removing)


def sync(path: Path) -> None:
    """Puts a file's content, or a folder's list of names, on disk."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as fault:
        if not is_folder or fault.errno not in _NO_SYNC:
            raise
