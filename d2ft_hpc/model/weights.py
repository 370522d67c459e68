"""Where a model's weights come from: the hub, a safetensors file, or a folder as the hub keeps models."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from d2ft_hpc.errors import CheckpointError
from d2ft_hpc.files.untrusted import RefusedError, read_json

PRETRAINED = "pretrained"
HUB = "hf-hub:"
CLASSIFIER = "head."

_PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
"""How files that torch.save made usually end. They are not read: a pickle may execute anything."""


@dataclass(frozen=True)
class WeightsSource:
    """`overlay` tells timm where the weights are and how they were trained; empty: as the model's name says."""

    overlay: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None
    """Where they are in a file of the user's."""


def find_weights(weights: str | None) -> WeightsSource | None:
    """What `model.weights` stands for; None for random weights.

    None, "pretrained" (those of the model's name, from the hub or its cache), "hf-hub:OWNER/NAME", a safetensors file
    in timm's names, or a folder that holds one (as `model.safetensors`, or alone) and maybe a config.json of timm's.

    Raises CheckpointError if there is no such file or it is not a safetensors file.
    """
    if weights is None:
        return None
    if weights == PRETRAINED:
        return WeightsSource()
    if weights.startswith(HUB):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", weights.removeprefix(HUB)):
            raise CheckpointError(f"model.weights={weights}: no name of the hub's; write {HUB}OWNER/NAME")
        return WeightsSource({"hf_hub_id": weights.removeprefix(HUB)})
    path = Path(weights)
    described: dict[str, Any] = {}
    if path.is_dir():
        described = _description(path / "config.json")
        path = _file_in(path)
    num_classes = _shapes(path).get(f"{CLASSIFIER}weight", [0])[0]
    # Some of timm's names stand for weights in a format of their own ("custom_load"); a file of the user's is not.
    told = {"file": str(path), "num_classes": num_classes, "custom_load": False}
    return WeightsSource({**described, **told}, path)


def check_complete(path: Path, model: nn.Module, name: str) -> None:
    """timm would fill what a file lacks with random weights. Raises CheckpointError if the file lacks more than the
    classifier."""
    in_file = _shapes(path)
    lacking = [key for key in model.state_dict() if key not in in_file and not key.startswith(CLASSIFIER)]
    if lacking:
        raise CheckpointError(
            f"model.weights={path}: lacks {len(lacking)} of {name}'s parameters, first {lacking[0]!r}: "
            f"use weights of the same model in timm's names"
        )
    for key, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise CheckpointError(
                f"model.weights={path}: {key!r} has values that are not finite: its run diverged, or it is damaged; "
                f"use other weights"
            )


def _file_in(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    named = folder / "model.safetensors"
    if named in files:
        return named
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "no safetensors file"
        raise CheckpointError(
            f"model.weights={folder}: has {found}; it needs model.safetensors, or name the file itself"
        )
    return files[0]


def _description(config: Path) -> dict[str, Any]:
    """The pixels' mean and standard deviation from a config.json as timm writes it; empty without one."""
    if not config.exists():
        return {}
    try:
        described = read_json(config)
        described = {**described, **described.get("pretrained_cfg", {})}
        statistics: dict[str, Any] = {
            key: tuple(map(float, described[key])) for key in ("mean", "std") if key in described
        }
        for key, values in statistics.items():
            if len(values) not in (1, 3) or not all(-1e3 < value < 1e3 for value in values):
                raise RefusedError(f"{key} has no numbers of 1 or 3 channels")
        if not all(value > 0 for value in statistics.get("std", ())):
            raise RefusedError("std is not above 0")
        return statistics
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{config}: not a readable description of a model: {error}") from error


def _fix_of(value: str) -> str:
    """What to write in place of a value that is neither a word nor a file."""
    if difflib.get_close_matches(value, [PRETRAINED], cutoff=0.7):
        return f"did you mean {PRETRAINED}?"
    return (
        f"write {PRETRAINED}, {HUB}OWNER/NAME, the path of a safetensors file or of its folder, or null for random "
        f"weights"
    )


def _shapes(path: Path) -> dict[str, list[int]]:
    if path.exists() and not path.is_file():
        raise CheckpointError(f"model.weights={path}: not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"model.weights={path}: no such file; {_fix_of(str(path))}") from None
    except (SafetensorError, OSError) as error:
        fix = "; save the state dict by safetensors.torch.save_file" if path.suffix in _PICKLED else ""
        raise CheckpointError(
            f"model.weights={path}: not a readable safetensors file: {error}{fix}"
        ) from None
