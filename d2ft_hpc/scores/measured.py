"""Measured scores of a plan's rows, and a cache of them on disk."""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from d2ft_hpc.errors import DataError

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
        with h5py.File(image, "w") as file:
            file.attrs["format"] = FORMAT
            file["forward"], file["backward"] = self.forward, self.backward
            for name in ("seconds", "flops", "forward_name", "backward_name"):
                file.attrs[name] = getattr(self, name)
        return image.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> Scores:
        """Scores that `to_bytes` wrote, marked as cached. Raises DataError if the bytes are foreign or damaged."""
        try:
            with h5py.File(io.BytesIO(content), "r") as file:
                if file.attrs["format"] != FORMAT:
                    raise DataError("not a file of scores")
                scores = Scores(
                    file["forward"][()].astype(np.float32),
                    file["backward"][()].astype(np.float32),
                    float(file.attrs["seconds"]),
                    str(file.attrs["forward_name"]),
                    str(file.attrs["backward_name"]),
                    float(file.attrs["flops"]),
                    cached=True,
                )
        except (OSError, LookupError, RuntimeError, ValueError, TypeError) as error:
            raise DataError(f"not a readable file of scores: {error}") from error
        if scores.forward.ndim != 3 or scores.forward.shape != scores.backward.shape:
            raise DataError(f"scores of shapes {scores.forward.shape} and {scores.backward.shape}")
        return scores


class ScoreCache:
    """A folder with one HDF5 file for each (model, data, settings)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str) -> bytes:
        """The file's content, or nothing where there is none or it is damaged."""
        try:
            content = self._path(key).read_bytes()
            Scores.from_bytes(content)
        except (OSError, DataError):
            return b""
        return content

    def write(self, key: str, scores: Scores) -> None:
        """Complete or not at all. Raises DataError where it cannot be written."""
        temporary = self._path(f"{key}.{uuid.uuid4().hex}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(scores.to_bytes())
            os.replace(temporary, self._path(key))
        except OSError as error:
            raise DataError(
                f"plan.score_cache={self._folder}: cannot be written: {error}; choose another folder, or null"
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

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
