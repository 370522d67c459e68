"""Paths as users write them, in configurations and on the command line."""

from __future__ import annotations

import argparse
import errno
import os
import re
import stat
from pathlib import Path

from d2ft_hpc.safe_text import shown

_MOST_BYTES, _MOST_BYTES_OF_NAME = 4095, 255
"""Of Linux."""


def expand(path: str) -> str:
    """The path with a leading `~` or `~user` replaced by that home folder.

    Raises ValueError for an empty path, which would be this folder; for variables, since filling them in would put
    the environment's values, secrets too, into folders' names and records, and keeping them would make folders of
    that name; and for names that no file can have, which each function would report differently.
    """
    if not path:
        raise ValueError("empty: write a path, or leave it out")
    if "\0" in path:
        raise ValueError("a path has no NUL character")
    variable = re.search(r"\$(\w+|\{[^}]*\}?)", path)
    if variable is not None:
        raise ValueError(f"variables are not filled in: write out what {variable[0]} stands for")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"no such user; a folder of that name in this one is ./{path}")
    try:
        encoded = os.fsencode(expanded)
    except UnicodeEncodeError:
        raise ValueError("holds characters that no file's name can have") from None
    if len(encoded) > _MOST_BYTES or max(map(len, encoded.split(b"/"))) > _MOST_BYTES_OF_NAME:
        raise ValueError(
            f"a path has at most {_MOST_BYTES} bytes, and {_MOST_BYTES_OF_NAME} between two slashes"
        )
    return expanded


def path_argument(text: str) -> Path:
    """For argparse: the path, by `expand`."""
    try:
        return Path(expand(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)}: {error}") from error


def why_not_writable(folder: Path) -> str:
    """Why nothing can be written into a folder that may have to be made first; "" if it can, as far as one sees."""
    for path in (folder, *folder.parents):
        try:
            if not stat.S_ISDIR(path.stat().st_mode):
                return f"{shown(str(path))}: {os.strerror(errno.ENOTDIR)}"
            if not os.access(path, os.W_OK | os.X_OK):
                return f"{shown(str(path))}: {os.strerror(errno.EACCES)}"
            return ""
        except (FileNotFoundError, NotADirectoryError):
            continue  # it does not exist yet, or a file further up is in its place
        except OSError as error:
            return f"{shown(str(path))}: {error.strerror}"
    return ""
