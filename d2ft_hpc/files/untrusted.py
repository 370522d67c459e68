"""Small files that anybody may have written, and that may have come to disk in part only."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from d2ft_hpc.safe_text import shortened


class RefusedError(ValueError):
    """What a file holds cannot be ours; the text says why, and what raises it further names the file."""


def read_bytes(path: Path, limit: int) -> bytes:
    """All of a regular file of at most `limit` bytes.

    Raises RefusedError for pipes, devices and larger files, and OSError.
    """
    # A pipe without a writer must not hold this process up before it is known to be one.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise RefusedError("it is not a regular file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise RefusedError(f"it is larger than {limit >> 10} KiB")
    return content


def read_json(path: Path, limit: int = 1 << 20) -> dict[str, Any]:
    """The object in a JSON file. Raises RefusedError or OSError."""
    return parse_json(read_bytes(path, limit))


def parse_json(text: str | bytes) -> dict[str, Any]:
    """The object that the text is. Raises RefusedError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"it is no JSON: {error}" if text else "it is empty") from None
    if not isinstance(value, dict):
        raise RefusedError("it is no JSON object")
    return value


def first_fault(error: ValidationError) -> str:
    """What pydantic refused first, in a line."""
    fault = error.errors(include_input=False, include_url=False)[0]
    return shortened(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}")
