"""Caches of compiled code: where the home folder cannot be written, libraries are pointed to another folder of this
user."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from d2ft_hpc.launch.control import print_line
from d2ft_hpc.paths import why_not_writable

_DEFAULTS = {"TRITON_CACHE_DIR": "~/.triton/cache", "TORCH_EXTENSIONS_DIR": "~/.cache/torch_extensions"}
"""Variables that Triton and torch's extensions (DeepSpeed's) read; both fail where they cannot write. The caches of
TorchInductor and matplotlib need no home folder."""


def make_caches_usable(*, tells: bool) -> None:
    """Points the caches that cannot be written elsewhere, for this process and those that it starts.

    tells: whether this process says so.
    """
    for variable, default in _DEFAULTS.items():
        if variable not in os.environ and why_not_writable(Path(default).expanduser()):
            os.environ[variable] = str(_own_folder() / variable.lower())
            if tells:
                print_line(
                    f"d2ft-hpc: warning: {default} cannot be written: {variable}={os.environ[variable]} is used"
                )


def _own_folder() -> Path:
    """Nobody else may write to it, since its content is executed."""
    folder = Path(tempfile.gettempdir()) / f"d2ft-hpc-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="d2ft-hpc-"))
