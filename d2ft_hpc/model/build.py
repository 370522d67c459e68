"""Makes a model by timm's name and loads its weights."""

from __future__ import annotations

import difflib
import inspect
import re
from contextlib import nullcontext
from typing import Any

import timm
import torch
from torch import nn

import d2ft_hpc.demo.model  # noqa: F401  (makes timm know the demo's model)
from d2ft_hpc.errors import CheckpointError, ConfigError, UnsupportedModelError
from d2ft_hpc.families.family import BlockFamily
from d2ft_hpc.model.hub import cache_alone_if_unreachable
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.model.weights import check_complete, find_weights
from d2ft_hpc.safe_text import shortened, shown


def build_model(
    name: str, *, num_classes: int, weights: str | None = None, options: dict[str, Any] | None = None
) -> nn.Module:
    """The model with a new classifier of `num_classes`, on the CPU in float32.

    weights: see `find_weights`. Position embeddings and patch projection are resampled to the model's image and patch
    size as timm does (`options`: img_size, patch_size, ...); a classifier of another size is dropped, and a new one
    on pretrained weights starts near zero (`_LARGEST_START`).

    Raises ConfigError (unknown name, options that do not fit), CheckpointError (unreadable or unfitting weights) or
    UnsupportedModelError (cannot be cut by head). Except for CheckpointError this happens before any weights are
    looked for.
    """
    _check_name(name)
    given = options or {}
    _check_options(name, given)
    _check_draft(name, num_classes, given)
    source = find_weights(weights)
    told_of = {**_described(name), **source.overlay} if source is not None else {}
    of_hub = "hf_hub_id" in told_of and "file" not in told_of
    with cache_alone_if_unreachable() if of_hub else nullcontext("") as no_hub:
        try:
            model: nn.Module = timm.create_model(
                name,
                pretrained=source is not None,
                num_classes=num_classes,
                **({"pretrained_cfg_overlay": source.overlay} if source and source.overlay else {}),
                **given,
            )
        except Exception as error:  # timm, the hub and torch raise many kinds of errors here
            if source is None:
                raise _unfit(name, given, error) from error
            told = f"{no_hub}, and not in the cache" if no_hub else _what_differs(error)
            fix = _HUB_FIX if of_hub else "; correct model.options, or use weights of this model"
            raise CheckpointError(
                f"model.weights={weights}: cannot be loaded into {name}: {told}{fix}"
            ) from error
    if source and source.file:
        check_complete(source.file, model, name)
    if source and told_of.get("num_classes") != num_classes:  # then timm left the classifier as it was made
        _start_small(model)
    return model


_LARGEST_START = 1e-3
"""Standard deviation of a new classifier's weights. Random logits of timm's 0.02 send random gradients into pretrained
blocks: after an epoch of CIFAR-100 a classifier from zero is 1.5 points better (analysis/tokens). Zero itself would
leave no gradients to score subnets by."""


@torch.no_grad()
def _start_small(model: Any) -> None:
    for parameter in model.get_classifier().parameters():
        spread = float(parameter.std()) if parameter.dim() > 1 else 0.0
        if spread > _LARGEST_START:
            parameter.mul_(_LARGEST_START / spread)


def _check_options(name: str, options: dict[str, Any]) -> None:
    for key, value in options.items():
        if key in _SET_ELSEWHERE:
            raise ConfigError(f"model.options.{key}={shown(value)}: {_SET_ELSEWHERE[key]}; remove it")
    channels, drop_path = options.get("in_chans", 3), options.get("drop_path_rate", 0)
    if channels != 3:
        raise ConfigError(
            f"model.options.in_chans={shown(channels)}: images have 3 channels, grey ones too; remove it"
        )
    if not isinstance(drop_path, float | int) or not 0 <= drop_path < 1:
        raise ConfigError(
            f"model.options.drop_path_rate={shown(drop_path)}: a share of samples, from 0 to below 1"
        )


_SET_ELSEWHERE = {
    "num_classes": "the data set's classes are counted",
    **dict.fromkeys(
        ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
        "model.weights says where weights come from",
    ),
    **dict.fromkeys(("device", "dtype"), "engine.device and engine.precision say so"),
}
"""Options of timm.create_model that are decided by something else."""


def _check_draft(name: str, num_classes: int, options: dict[str, Any]) -> None:
    """Makes the model without weights or memory for them, and looks at its parts and at the form of its output."""
    try:
        draft = _draft(name, num_classes=num_classes, **options)
    except Exception as error:
        if options:
            _require_supported(name, _draft(name))  # no option makes another model of it
        raise _unfit(name, options, error) from error
    family = _require_supported(name, draft)
    if hasattr(draft, "head_dist"):
        raise UnsupportedModelError(
            f"model.name={name!r} has a second classifier for distillation, which has no loss here: take the "
            f"model without it, or train it in a loop of your own (d2ft_hpc.attach)"
        )
    of_images = family.image_shape(draft) or draft.pretrained_cfg["input_size"]
    try:
        shape = tuple(draft(torch.empty(2, *of_images, device="meta")).shape)
    except Exception as error:
        raise _unfit(name, options, error) from error
    if shape != (2, num_classes):
        raise ConfigError(
            f"model.options={shown(options)}: {name} then gives {shape} for 2 images instead of a number for each "
            f"class; correct or remove them"
        )


def _draft(name: str, **options: Any) -> Any:
    """The model without weights or memory for them."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return timm.create_model(name, **options)
        except RuntimeError as error:
            if "meta" not in str(error):  # older versions of timm look at values while they make a model
                raise
            return timm.create_model(name, **options).to("meta")


def _require_supported(name: str, model: nn.Module) -> BlockFamily:
    try:
        return SubnetMap.of(model).family
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"model.name={name!r}: {error}") from error


def _unfit(name: str, options: dict[str, Any], error: Exception) -> ConfigError:
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if isinstance(error, TypeError) and unknown and unknown[1] in options:
        key = unknown[1]
        known = {*inspect.signature(type(_draft(name))).parameters} - {key, *_SET_ELSEWHERE}
        near = difflib.get_close_matches(key, known, n=1)
        return ConfigError(
            f"model.options.{key}={shown(options[key])}: {name} has no such option; "
            + (f"did you mean model.options.{near[0]}?" if near else "remove it")
        )
    return ConfigError(
        f"model.options={shown(options)}: {name} cannot be made with them: {_first_line(error)}; correct or remove them"
    )


def pixel_statistics(name: str, weights: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, by channel, of the pixels (0 to 1) that the weights were trained on.

    Raises ConfigError (unknown name) or CheckpointError (no such weights).
    """
    _check_name(name)
    source = find_weights(weights)
    of_weights = {**_described(name), **(source.overlay if source else {})}
    mean, std = (of_weights.get(key) for key in ("mean", "std"))
    return tuple(mean or (0.5, 0.5, 0.5)), tuple(std or (0.5, 0.5, 0.5))


def _described(name: str) -> dict[str, Any]:
    """What timm knows about the weights that a model's name stands for."""
    known = timm.get_pretrained_cfg(name)
    return known.to_dict() if known is not None else {}


_HUB_FIX = (
    "; without a network, load it once where there is one (the cache is the folder HF_HOME) and set HF_HUB_OFFLINE=1, "
    "or set model.weights to a safetensors file or a folder with one"
)


_SUPPORTED = ["vit_*", "deit*", "eva*", "beit*", "naflexvit*"]
"""Names of timm's that nearly always stand for models that train under plans."""


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(_SUPPORTED), n=1)
        raise ConfigError(
            f"model.name={shown(name)}: timm has no such model"
            + (f"; did you mean {close[0]}?" if close else "; d2ft-hpc models lists those that train")
        )
    architecture, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        known = ", ".join(tags) or "none"
        raise ConfigError(
            f"model.name={name!r}: timm knows no weights {tag!r} of {architecture}; it knows {known}"
        )


def _what_differs(error: Exception) -> str:
    """The first two lines of an error: torch says in the second one which weight does not fit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(f"{type(error).__name__}: {' '.join(lines[:2])}", 400)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
