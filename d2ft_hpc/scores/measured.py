"""Measured scores of a plan's rows, and a cache of them on disk."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from d2ft_hpc.errors import DataError
from d2ft_hpc.files import atomic, hdf5
from d2ft_hpc.files.untrusted import read_bytes
from d2ft_hpc.safe_text import one_line

FORMAT = "d2ft-hpc scores"


@dataclass(frozen=True)
class Scores:
    """Contribution scores, float32 [row, block, head]; row = slot * replicas + replica."""

    forward: npt.NDArray[np.float32]
    backward: npt.NDArray[np.float32]
    seconds: float
    """Time that measuring them took, charged to the run (also where they came from the cache)."""
    forward_name: str = ""
    backward_name: str = ""
    flops: float = 0.0
    """What measuring them computed, over all ranks."""
    cached: bool = False

    def to_bytes(self) -> bytes:
        """As the HDF5 file that the cache keeps."""
        image = io.BytesIO()
        with h5py.File(image, "w", libver=("v110", "v110")) as file:
            file["forward"], file["backward"] = self.forward, self.backward
            texts = {"format": FORMAT, "sha256": _checksum(self.forward, self.backward)}
            texts |= {"forward_name": self.forward_name, "backward_name": self.backward_name}
            for name, text in texts.items():
                file.attrs[name] = np.bytes_(text.encode() or b"\0")
            file.attrs["seconds"], file.attrs["flops"] = float(self.seconds), float(self.flops)
        return image.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> Scores:
        """Scores that `to_bytes` wrote, marked as cached. Raises DataError if the bytes are foreign or damaged."""
        try:
            with hdf5.open_image(content) as file:
                about = hdf5.read_attributes(file, _ATTRIBUTES)
                allowance = hdf5.Allowance(len(content))
                forward, backward = (
                    np.asarray(hdf5.read_array(hdf5.child(file, name), allowance), np.float32)
                    for name in ("forward", "backward")
                )
        except Exception as error:  # whatever damage provokes in the library
            raise DataError(f"not a readable file of scores: {one_line(hdf5.reason(error))}") from error
        if about["format"] != FORMAT or about["sha256"] != _checksum(forward, backward):
            raise DataError("not a file of scores, or damaged")
        if forward.ndim != 3 or forward.shape != backward.shape:
            raise DataError(f"scores of shapes {forward.shape} and {backward.shape}")
        seconds, flops = about["seconds"], about["flops"]
        if not (isinstance(seconds, float) and isinstance(flops, float) and 0 <= seconds + flops < np.inf):
            raise DataError(f"scores that took {seconds!r} seconds and {flops!r} FLOP")
        names = (str(about["forward_name"]), str(about["backward_name"]))
        return Scores(forward, backward, seconds, *names, flops, cached=True)


_ATTRIBUTES = ("format", "sha256", "forward_name", "backward_name", "seconds", "flops")
_MOST_BYTES = 1 << 30


def _checksum(*arrays: npt.NDArray[Any]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


class ScoreCache:
    """A folder with one HDF5 file for each (model, data, settings)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str) -> bytes:
        """The file's content, or nothing where there is none or it is damaged."""
        try:
            content = read_bytes(self._path(key), _MOST_BYTES)
            Scores.from_bytes(content)
        except (OSError, ValueError, DataError):
            return b""
        return content

    def write(self, key: str, scores: Scores) -> None:
        """Complete or not at all. Raises DataError where it cannot be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            atomic.write(self._path(key), scores.to_bytes(), shared=True)
        except OSError as error:
            raise DataError(
                f"plan.score_cache={self._folder}: cannot be written: {error}; choose another folder, or null"
            ) from error

    def _path(self, key: str) -> Path:
        return self._folder / f"scores-{key}.h5"


def digest(model: nn.Module, tensors: Iterable[Tensor], settings: Mapping[str, Any]) -> bytes:
    """SHA-256 of all that a measurement depends on: every weight, the data itself, the settings."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in (*model.state_dict().items(), *(("", tensor) for tensor in tensors)):
        value = tensor.detach().cpu().float().contiguous()
        found.update(f"{name} {tuple(value.shape)}".encode())
        found.update(value.numpy().tobytes())
    return found.digest()
