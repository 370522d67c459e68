"""Makes a model by timm's name and loads its weights."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import VisionTransformer

import d2ft_hpc.demo.model  # noqa: F401  (makes timm know the demo's model)
from d2ft_hpc.errors import CheckpointError, ConfigError, UnsupportedModelError

PRETRAINED = "pretrained"
CLASSIFIER = "head."


def build_model(
    name: str, *, num_classes: int, weights: str | None = None, options: dict[str, Any] | None = None
) -> VisionTransformer:
    """The model with a new classifier of `num_classes`, on the CPU in float32.

    weights: None for random ones, "pretrained" for those of timm's name, else a safetensors file in timm's names;
    position embeddings are resampled to the model's image size as timm does.

    Raises ConfigError (unknown name or option), CheckpointError (unreadable or unfitting weights) or
    UnsupportedModelError (not a vision transformer).
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models("*vit*"), n=1, cutoff=0.3)
        raise ConfigError(
            f"model.name={name!r}: timm has no such model" + (f"; did you mean {close[0]}?" if close else "")
        )
    source = (
        {} if weights in (None, PRETRAINED) else {"pretrained_cfg_overlay": _weights_file(Path(str(weights)))}
    )
    try:
        model = timm.create_model(
            name, pretrained=weights is not None, num_classes=num_classes, **source, **(options or {})
        )
    except TypeError as error:
        raise ConfigError(f"model.options={options}: not accepted by {name}: {error}") from error
    except Exception as error:  # timm, the hub and torch raise many kinds here
        if weights is None:
            raise
        raise CheckpointError(
            f"model.weights={weights}: cannot be loaded into {name}: {_first_line(error)}"
        ) from error
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(
            f"model.name={name!r} is a {type(model).__name__}, not a timm VisionTransformer"
        )
    if source:
        _check_complete(Path(str(weights)), model, name)
    return model


def _weights_file(path: Path) -> dict[str, Any]:
    """timm's description of a weights file. Raises CheckpointError where it is not a safetensors file."""
    shapes = _shapes(path)
    return {"file": str(path), "num_classes": shapes.get(f"{CLASSIFIER}weight", [0])[0]}


def _shapes(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"model.weights={path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"model.weights={path}: not a readable safetensors file: {error}") from None


def _check_complete(path: Path, model: VisionTransformer, name: str) -> None:
    """timm fills what a file lacks with random weights; only the classifier may be new."""
    in_file = _shapes(path)
    lacking = [key for key in model.state_dict() if key not in in_file and not key.startswith(CLASSIFIER)]
    if lacking:
        raise CheckpointError(
            f"model.weights={path}: lacks {len(lacking)} of {name}'s parameters, first {lacking[0]!r}: "
            f"use weights of the same model in timm's names"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
