"""What is wrong with a configuration, in one line a fault: the key, the value and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from inspect import isclass
from typing import Any, TypeGuard, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from d2ft_hpc.errors import ConfigError
from d2ft_hpc.planning.planner import Options
from d2ft_hpc.planning.table import PLANNERS
from d2ft_hpc.safe_text import shown
from d2ft_hpc.settings import Section, either, of_percent

Kind = TypeVar("Kind")
KindOfSection = TypeVar("KindOfSection", bound=Section)

REPLACED = {
    "data.mixup_alpha": "write data.timm.mixup_alpha",
    "data.cutmix_alpha": "write data.timm.cutmix_alpha",
    "data.evaluate_on": "evaluation is on the images that data.validation_fraction holds out, where it is above 0",
    "data.split_seed": "run.seed decides which images are held out",
    "model.lora.layers": "all of qkv, proj, fc1 and fc2 are adapted; remove it",
    "plan.probe_batches": "scores come from one batch; remove it",
    "plan.replan.unit": "every says it, such as '100 steps'",
    "plan.warmup_share": "the budget holds from the first step on; remove it",
    "results.locking": "a run is locked wherever the file system has locks; remove it",
    "results.flush_seconds": "records are written every 5 seconds; remove it",
}
"""Keys that there were, and what does their work now."""


_IN_WORDS = dict.fromkeys(("model_type", "dict_type"), "holds settings of its own, {KEY: VALUE}")
"""For the types of pydantic's faults that it tells in words of Python."""


def validated(schema: type[KindOfSection], values: Any, prefix: str = "") -> KindOfSection:
    """`values` as that section. Raises ConfigError with one line a fault; prefix: stands before its keys."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, schema, prefix))) from None


def explain(error: ValidationError, schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """One line for each fault: key, value, what is wrong, what would be right.

    schema: what was validated; prefix: stands before its keys, as in "d2ft.".
    """
    expected: dict[str, list[str]] = {}  # a value that may be one of several types fails as each
    for fault in error.errors():
        key = prefix + ".".join(_key_parts(fault["loc"], schema, unknown=fault["type"] == "extra_forbidden"))
        if fault["type"] == "extra_forbidden":
            fix = REPLACED.get(own := key.removeprefix(prefix)) or REPLACED.get(f"plan.{own}")
            value = f"(value {shown(fault['input'])})"
            what = (
                f"no longer a key {value}; {fix}"
                if fix
                else f"unknown key {value}{_nearest(key, schema, prefix)}"
            )
            yield f"{key}: {what}"
        elif fault["type"] == "of_section":
            yield f"{key}.{fault['msg']}" if fault["loc"] else f"{key}{fault['msg']}"
        elif fault["type"] == "missing":
            yield f"{key}: missing; set it in the file or as {key}=VALUE"
        elif not fault["loc"]:
            told = fault["msg"].removeprefix("Value error, ")
            yield (
                told
                if fault["type"] == "value_error"
                else f"{prefix.removesuffix('.')}{'=' if prefix else ''}{shown(fault['input'])}: holds no settings"
            )
        else:
            told = _IN_WORDS.get(fault["type"], fault["msg"].removeprefix("Value error, "))
            if told.startswith(f"{key}."):  # it names a key inside
                yield told
                continue
            told = f"{told[0].lower()}{told[1:]}{_as_share(fault)}"
            expected.setdefault(f"{key}={shown(fault['input'])}", []).append(told)
    for value, told_of in expected.items():
        yield f"{value}: {', or '.join(told_of)}"


def _as_share(fault: ErrorDetails) -> str:
    """What to write for a value in per cent: a number above a bound of 1, or a text. Members of lists, such as the
    sides of images, are never written in per cent."""
    if isinstance(fault["loc"][-1], int):
        return ""
    bounds = fault.get("ctx", {})
    is_share = 1 in (bounds.get("le"), bounds.get("lt")) or fault["type"] == "float_type"
    return of_percent(fault["input"]) if is_share else ""


def _key_parts(
    location: Sequence[str | int], schema: type[BaseModel] | None, *, unknown: bool
) -> Iterator[str]:
    """A fault's place without the names of the types that were tried there."""
    for part in location:
        fields = _fields(schema)
        if part not in fields and not isinstance(part, int) and not unknown:
            return
        yield str(part)
        schema = section_of(fields[str(part)].annotation) if part in fields else None


def _fields(schema: type[BaseModel] | None) -> Mapping[str, FieldInfo]:
    """The keys of a section; of the one for a planner's options, those of all planners."""
    if schema is Options:
        return {key: info for entry in PLANNERS.values() for key, info in entry.options.model_fields.items()}
    return schema.model_fields if schema is not None else {}


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a key holds, if it holds one."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if is_class_of(kind, Section)), None)


def is_class_of(annotation: Any, kind: type[Kind]) -> TypeGuard[type[Kind]]:
    """Whether an annotation is that class or one derived from it. Python 3.10 takes `list[str]` for a class, too."""
    return get_origin(annotation) is None and isclass(annotation) and issubclass(annotation, kind)


def _nearest(key: str, schema: type[BaseModel], prefix: str) -> str:
    """The valid keys that were likely meant: those of its section that end in the key's word, as compute_budget does in
    budget, else the most similar one of its section, else one by its last part in whatever section. If there is none,
    all that its section holds."""
    section, dot, last = key.rpartition(".")
    start = section + dot
    valid = list(_keys(schema, prefix))
    inside = {each.removeprefix(start): each for each in valid if each.startswith(start)}
    by_last_part = {each.rpartition(".")[-1]: each for each in valid if not key.startswith(f"{each}.")}
    ending = [each for each in inside.values() if each.endswith(f"_{last}") and last not in by_last_part]
    if close := ending or _similar(last, inside, 0.7) or _similar(last, by_last_part, 0.6):
        return f"; did you mean {either(close)}?"
    return f"; valid here: {', '.join(name for name in inside if '.' not in name)}"


def _similar(name: str, keys: Mapping[str, str], cutoff: float) -> list[str]:
    return [keys[near] for near in difflib.get_close_matches(name, list(keys), n=1, cutoff=cutoff)]


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in _fields(section).items():
        yield prefix + name
        inner = section_of(info.annotation)
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}.")
