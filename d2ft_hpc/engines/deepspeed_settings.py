"""Lets DeepSpeed read its settings before anything starts, to find those that it would ignore silently."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, KeysView, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError

from d2ft_hpc.engines.deepspeed_keys import unknown_key
from d2ft_hpc.engines.deepspeed_private import import_deepspeed
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.safe_text import shown

_MICRO_BATCH_SIZE = "train_micro_batch_size_per_gpu"
_BATCH = ("train_batch_size", _MICRO_BATCH_SIZE, "gradient_accumulation_steps")
_READ_LATER = {
    # By deepspeed.initialize, or with others.
    "": ("sequence_parallel_size", "data_parallel_size", "eigenvalue"),
    "pipeline": ("use_reentrant",),  # by its pipeline engine
}
"""Keys that DeepSpeed does not read together with its configuration but later, by section."""


class _Watched(dict[str, Any]):
    """A part of the settings that remembers which keys were asked for, present or not."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        inside = {
            key: _Watched(value) if isinstance(value, Mapping) else value for key, value in settings.items()
        }
        super().__init__(inside)
        self.asked: list[Any] = []

    def __getitem__(self, key: str) -> Any:
        self.asked.append(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.append(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.append(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return KeysView(self)

    def __copy__(self) -> _Watched:
        return self

    def __deepcopy__(self, _: Any) -> _Watched:
        return self


def check_settings(settings: Mapping[str, Any], where: str = "") -> None:
    """Raises ConfigError where the installed DeepSpeed does not know a key or does not take a value.

    Which keys there are is seen from what DeepSpeed asks for while it reads the settings, and from the fields of its
    own classes. where: stands before the keys in messages.
    """
    for key in _BATCH:
        value = settings.get(key, 1)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{where}{key}={shown(value)}: a whole number, at least 1")
    watched = _Watched({key: value for key, value in settings.items() if key not in _BATCH})
    dict.__setitem__(watched, _MICRO_BATCH_SIZE, 1)  # how many ranks share a batch is not known yet
    with _quiet():
        from deepspeed.runtime.config import DeepSpeedConfig

        defaults = DeepSpeedConfig({_MICRO_BATCH_SIZE: 1})
        for key, value in settings.items():
            default = getattr(defaults, key, None) if isinstance(key, str) else None
            if isinstance(default, int | float) and not isinstance(value, int | float | None):
                kind = "true or false" if isinstance(default, bool) else "a number"
                raise ConfigError(f"{where}{key}={shown(value)}: {kind} is needed, such as {default}")
        try:
            DeepSpeedConfig(watched)
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(error, watched, where))) from None
        # DeepSpeed's own classes of errors, assertions, or whatever a wrong type leads to.
        except Exception as error:
            faulty = next((each for each in reversed(watched.asked) if each in settings), None)
            if faulty is None:
                raise
            told = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"{where}{faulty}={shown(settings[faulty])}: DeepSpeed {version('deepspeed')} does not take it: {told}"
            ) from None
    inner = dict.get(watched, "pipeline")
    if isinstance(inner, _Watched):  # DeepSpeed takes whatever is in it
        inner.asked += defaults.pipeline
    faults = list(_unknown(watched, where))
    if faults:
        raise ConfigError("\n".join(faults))


def _unknown(watched: _Watched, where: str, section: str = "") -> Iterator[str]:
    """A line for each key that nobody asked for, in those sections where DeepSpeed asked for single keys."""
    asked = [str(each) for each in watched.asked]
    known = {*watched.asked, *_READ_LATER.get(section, ()), *(_fields() if section else _BATCH)}
    for key, value in dict.items(watched):
        path = f"{section}.{key}" if section else key
        if isinstance(value, _Watched) and key in known:
            yield from _unknown(value, where, path)
        if watched.asked and key not in known:
            # DeepSpeed asks for some keys later, or only where others are set.
            all_known = section in ("", "pipeline")
            near = difflib.get_close_matches(str(key), asked, n=1, cutoff=0.6 if all_known else 0.8)
            if near or all_known:
                yield unknown_key(where + path, value, near)


def _explain(error: ValidationError, watched: _Watched, where: str) -> Iterator[str]:
    """As `config_faults.explain`, for DeepSpeed's classes."""
    section = next(key for key in reversed(watched.asked) if dict.__contains__(watched, key))
    for fault in error.errors():
        location = [str(part) for part in fault["loc"]]
        if not location or not dict.__contains__(watched, location[0]):
            location = [section, *location]
        path = where + ".".join(location)
        if fault["type"] == "extra_forbidden":
            yield unknown_key(path, fault["input"], difflib.get_close_matches(location[-1], _fields(), n=1))
        else:
            yield f"{path}={shown(fault['input'])}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _fields() -> set[str]:
    """Fields of all classes that DeepSpeed reads sections into. These classes refuse unknown fields by themselves."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    kinds, found = [DeepSpeedConfigModel], set[str]()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        found |= {each for name, info in kind.model_fields.items() for each in (name, info.alias or name)}
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences DeepSpeed here: it says everything once more when it reads the settings to run."""
    import_deepspeed()
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
