"""Libraries that only some users need, which pip installs as extras of this package."""

from __future__ import annotations


def cannot_import(error: ImportError, library: str, extra: str) -> str:
    """What to tell of it: that the library is missing, or why the one that is there does not import."""
    if isinstance(error, ModuleNotFoundError) and error.name == library:
        return f"needs the library {library}: pip install 'd2ft-hpc[{extra}]'"
    told = " ".join(str(error).split())
    return f"the library {library} cannot be imported ({told[:200]}); pip install -U 'd2ft-hpc[{extra}]'"
