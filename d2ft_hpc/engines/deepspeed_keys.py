"""Which keys DeepSpeed cannot know, read from its files without importing it, which takes seconds and torch.

A key that it knows stands somewhere in its sources. What passes here is checked once more when DeepSpeed is there
(`deepspeed_settings`), which knows in which section a key belongs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

from d2ft_hpc.safe_text import shown

_NAMES_OF_OTHERS = ("params", "compression_training", "data_efficiency", "curriculum_learning", "autotuning")
"""Keys below which there are names that others choose: users, optimizers."""
_WORD = re.compile(r"\w+")
_KEY = re.compile(r"[\"'](\w+)[\"']|^ +(\w+) ?:", re.MULTILINE)


def unknown_keys(settings: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """A line for each key of settings for DeepSpeed that stands nowhere in it, with the nearest that does; nothing if
    it is not installed. where: stands before the keys."""
    paths = dict(_paths(settings))
    if not paths:
        return
    spec = PathFinder.find_spec("deepspeed")
    if spec is None or not spec.submodule_search_locations:
        return
    package = Path(spec.submodule_search_locations[0])
    told = [_text(file) for pattern in ("*config*.py", "*constants*.py") for file in package.rglob(pattern)]
    known = {word for text in told for word in _WORD.findall(text)}
    suspects = {path: key for path, key in paths.items() if key not in known}
    if not suspects:
        return
    everywhere = {word for file in package.rglob("*.py") for word in _WORD.findall(_text(file))}
    keys = {word for text in told for word in chain.from_iterable(_KEY.findall(text)) if word}
    for path, key in suspects.items():
        outer = path.rpartition(".")[0]
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.8 if outer else 0.7)
        if key not in everywhere and (near or not outer):
            fix = f"did you mean {where}{outer}{'.' * bool(outer)}{near[0]}?" if near else "remove it"
            value: Any = settings
            for part in path.split("."):
                value = value[part]
            yield f"{where}{path}: unknown key of DeepSpeed {_version()} (value {shown(value)}); {fix}"


def _paths(settings: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if not isinstance(key, str) or "." in key:
            continue
        yield outer + key, key
        if isinstance(value, Mapping) and key not in _NAMES_OF_OTHERS:
            yield from _paths(value, f"{outer}{key}.")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version() -> str:
    try:
        return version("deepspeed")
    except PackageNotFoundError:
        return ""
