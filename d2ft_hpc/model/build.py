"""Makes a model by timm's name and loads its weights."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer

import d2ft_hpc.demo.model  # noqa: F401  (makes timm know the demo's model)
from d2ft_hpc.errors import CheckpointError, ConfigError, UnsupportedModelError
from d2ft_hpc.model.weights import check_complete, find_weights


def build_model(
    name: str, *, num_classes: int, weights: str | None = None, options: dict[str, Any] | None = None
) -> VisionTransformer:
    """The model with a new classifier of `num_classes`, on the CPU in float32.

    weights: see `find_weights`. Position embeddings and patch projection are resampled to the model's image and patch
    size as timm does (`options`: img_size, patch_size, ...); a classifier of another size is dropped.

    Raises ConfigError (unknown name or option), CheckpointError (unreadable or unfitting weights) or
    UnsupportedModelError (not a vision transformer).
    """
    _check_name(name)
    source = find_weights(weights)
    try:
        model = timm.create_model(
            name,
            pretrained=source is not None,
            num_classes=num_classes,
            **({"pretrained_cfg_overlay": source.overlay} if source and source.overlay else {}),
            **(options or {}),
        )
    except TypeError as error:
        raise ConfigError(f"model.options={options}: not accepted by {name}: {error}") from error
    except Exception as error:  # timm, the hub and torch raise many kinds here
        if source is None:
            raise
        fix = "" if source.file else _HUB_FIX
        raise CheckpointError(
            f"model.weights={weights}: cannot be loaded into {name}: {_first_line(error)}{fix}"
        ) from error
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(
            f"model.name={name!r} is a {type(model).__name__}, not a timm VisionTransformer"
        )
    if source and source.file:
        check_complete(source.file, model, name)
    return model


def pixel_statistics(name: str, weights: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, by channel, of the pixels (0 to 1) that the weights were trained on.

    Raises ConfigError (unknown name) or CheckpointError (no such weights).
    """
    _check_name(name)
    known = timm.get_pretrained_cfg(name)
    source = find_weights(weights)
    of_weights: dict[str, Any] = source.overlay if source else {}
    mean, std = (of_weights.get(key, getattr(known, key, None)) for key in ("mean", "std"))
    return tuple(mean or (0.5, 0.5, 0.5)), tuple(std or (0.5, 0.5, 0.5))


_HUB_FIX = (
    "; without a network, load it once where there is one (the cache is the folder HF_HOME) and set HF_HUB_OFFLINE=1, "
    "or set model.weights to a safetensors file or a folder with one"
)


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models("*vit*"), n=1, cutoff=0.3)
        raise ConfigError(
            f"model.name={name!r}: timm has no such model" + (f"; did you mean {close[0]}?" if close else "")
        )
    architecture, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        known = ", ".join(tags) or "none"
        raise ConfigError(
            f"model.name={name!r}: timm knows no weights {tag!r} of {architecture}; it knows {known}"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
