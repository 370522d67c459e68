"""Reads settings for DeepSpeed and finds keys that it cannot know, without importing it, which would take seconds and
torch.

A key that it knows stands somewhere in its sources. What passes here is checked once more when DeepSpeed is there
(`deepspeed_settings`), which knows in which section a key belongs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from d2ft_hpc.safe_text import shown

_NAMES_OF_OTHERS = ("params", "compression_training", "data_efficiency", "curriculum_learning", "autotuning")
"""Keys below which names are chosen by others: by users or by optimizers."""
_SECTIONS = {
    "zero_optimization": "stage: 1",
    "tensor_parallel": "autotp_size: 2",
    "pipeline": "stages: 2",
    "fp16": "enabled: true",
    "bf16": "enabled: true",
}
"""Keys whose settings are read here, with an example of one."""
_WORD = re.compile(r"\w+")
_KEY = re.compile(r"[\"'](\w+)[\"']|^ +(\w+) ?:", re.MULTILINE)


def deepspeed_sections(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Settings for DeepSpeed, those that decide how plans run brought to one form; `where` stands before the keys in
    messages.

    `"zero_optimization": true` is DeepSpeed's older way to say stage 1. Raises ValueError.
    """
    settings = dict(settings)
    zero = settings.get("zero_optimization")
    if isinstance(zero, bool):
        settings["zero_optimization"] = {"stage": int(zero)}
    for key, example in _SECTIONS.items():
        if not isinstance(settings.get(key, {}), Mapping):
            raise ValueError(
                f"{where}{key}={shown(settings[key])}: holds settings of its own, such as {{{example}}}"
            )
    for key, inner, least, most in (
        ("zero_optimization", "stage", 0, 3),
        ("tensor_parallel", "autotp_size", 0, None),
        ("pipeline", "stages", 1, None),
    ):
        value = settings.get(key, {}).get(inner, least)
        if key == "pipeline" and value == "auto":
            continue
        if type(value) is not int or value < least or (most is not None and value > most):
            fix = "ZeRO has the stages 0, 1, 2 and 3" if most else f"a whole number, at least {least}"
            raise ValueError(f"{where}{key}.{inner}={shown(value)}: {fix}")
    return settings


def zero_stage(deepspeed: Mapping[str, Any], precision: str) -> Any:
    """ZeRO's stage in settings for DeepSpeed; without one 0, or 1 under fp16, whose losses DeepSpeed scales under ZeRO
    only."""
    return deepspeed.get("zero_optimization", {}).get("stage", int(precision == "fp16"))


def unknown_keys(settings: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """A line for each key of settings for DeepSpeed that stands nowhere in it, with the nearest that does; nothing if
    it is not installed. where: stands before the keys."""
    paths = list(_paths(settings))
    if not paths:
        return
    spec = PathFinder.find_spec("deepspeed")
    if spec is None or not spec.submodule_search_locations:
        return
    package = Path(spec.submodule_search_locations[0])
    told = [_text(file) for pattern in ("*config*.py", "*constants*.py") for file in package.rglob(pattern)]
    known = {word for text in told for word in _WORD.findall(text)}
    suspects = [each for each in paths if each[1] not in known]
    if not suspects:
        return
    everywhere = {word for file in package.rglob("*.py") for word in _WORD.findall(_text(file))}
    keys = {word for text in told for word in chain.from_iterable(_KEY.findall(text)) if word}
    for path, key, value in suspects:
        is_inner = path != key
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.8 if is_inner else 0.7)
        if key not in everywhere and (near or not is_inner):
            yield unknown_key(where + path, value, near)


def unknown_key(path: str, value: Any, near: Sequence[str]) -> str:
    """The line for a key that DeepSpeed does not know. near: the nearest ones that it knows beside it, or none."""
    outer = path.rpartition(".")[0]
    fix = f"did you mean {outer}{'.' * ('.' in path)}{near[0]}?" if near else "remove it"
    return f"{path}: unknown key of DeepSpeed {version('deepspeed')} (value {shown(value)}); {fix}"


def _paths(settings: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, str, Any]]:
    """The path of each key, the key and its value."""
    for key, value in settings.items():
        if not isinstance(key, str) or "." in key:
            continue
        yield outer + key, key, value
        if isinstance(value, Mapping) and key not in _NAMES_OF_OTHERS:
            yield from _paths(value, f"{outer}{key}.")


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")
