"""What our own HDF5 files are, by the attribute `format` of their root."""

from __future__ import annotations

from contextlib import suppress

import h5py

from d2ft_hpc.files.hdf5 import read_attributes
from d2ft_hpc.files.untrusted import RefusedError

RESULTS = "d2ft-hpc results"
IMAGES = "d2ft-hpc images"
PLAN = "d2ft-plan"
_IN_WORDS = {
    RESULTS: "the results of a run",
    IMAGES: "a packed data set (data.root)",
    PLAN: "a saved plan (plan.file)",
}


def other_kind(file: h5py.File, own: str) -> str | None:
    """What a file is in words, if it is one of ours but not of the kind `own`."""
    with suppress(RefusedError):
        kind = read_attributes(file, ["format"])["format"]
        return None if kind == own else _IN_WORDS.get(str(kind))
    return None
