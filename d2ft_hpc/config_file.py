"""Configurations as text: YAML files on top of each other, settings from the command line, references between keys.

YAML takes `no`, `12345` and `null` for something else than text. A scalar that YAML reads as anything but text is kept
with the text that was written (`Scalar`), so that a key that holds text can have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from d2ft_hpc.errors import ConfigError
from d2ft_hpc.paths import expand
from d2ft_hpc.safe_text import shown

_MOST_BYTES = 1 << 20
_MOST_RECORDED = 1 << 17
"""Most characters of a run's recorded configuration; reading that many takes seconds."""
_MOST_REFERRED = 1000
"""Characters of a value that others refer to."""
_MOST_VALUES = 10_000
"""Most values of a file, since a few lines of aliases of aliases can stand for any number of them."""

_MOST_BASES = 32
"""Most files below a file; a longer chain is a mistake, and takes long to read."""

_DEEPEST = 32
"""Most levels of keys in keys; no setting has more than a few."""


@dataclass(frozen=True)
class Scalar:
    """A bool, number or null, and how it was written."""

    value: bool | int | float | None
    text: str


Tree = dict[str, Any]
"""Made of mappings, lists, text and `Scalar`."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
    """YAML 1.1 with `1e-4` as a number, every key as text, and neither dates nor other kinds of values."""


class _Dumper(yaml.SafeDumper):  # type: ignore[misc,unused-ignore]
    """Quotes whatever `_Loader` would not read as text."""


_FLOAT = re.compile(
    r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [each for each in resolvers if each[0].rpartition(":")[2] not in ("timestamp", "float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> Scalar:
    kind = node.tag.rpartition(":")[2]
    return Scalar(getattr(yaml.SafeLoader, f"construct_yaml_{kind}")(loader, node), node.value)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Tree:
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    if len(keys) < len(node.value):
        raise yaml.constructor.ConstructorError(None, None, "a key that is no text", node.start_mark)
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise yaml.constructor.ConstructorError(None, None, f"key {twice} twice", node.start_mark)
    loader.flatten_mapping(node)
    return {key.value: loader.construct_object(value, deep=True) for key, value in node.value}


def _list(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return [loader.construct_object(value, deep=True) for value in node.value]


_Loader.yaml_constructors = {
    **{f"tag:yaml.org,2002:{kind}": _scalar for kind in ("bool", "int", "float", "null")},
    "tag:yaml.org,2002:str": yaml.SafeLoader.construct_yaml_str,
    "tag:yaml.org,2002:map": _mapping,
    "tag:yaml.org,2002:seq": _list,
    None: yaml.SafeLoader.construct_undefined,
}


def read_tree(path: Path, overrides: Sequence[str] = ()) -> Tree:
    """What a file, the `base:` files below it and overrides such as `plan.compute_budget=0.5` say together.

    A text with `${section.key}` gets that key's value. Raises ConfigError.
    """
    tree: Tree = {}
    for layer in (*_with_bases(path), *map(_of_override, overrides)):
        tree = _merged(tree, layer)
    return {key: _resolved(value, tree, (key,)) for key, value in tree.items()}


def plain(tree: Any) -> Any:
    """The tree with what YAML read in place of each `Scalar`."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    return tree.value if isinstance(tree, Scalar) else tree


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML that reads back as the same values."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6))


def read_values(path: Path) -> dict[str, Any]:
    """Plain values of one file. Raises ConfigError, FileNotFoundError."""
    return {key: plain(value) for key, value in _read(path).items()}


def parse_values(text: str) -> dict[str, Any]:
    """Plain values of a YAML text that a file of others holds. Raises ValueError with one line."""
    if len(text) > _MOST_RECORDED:
        raise ValueError(f"more than {_MOST_RECORDED >> 10} KiB, which no configuration has")
    tree = _parsed(text)
    if not isinstance(tree, dict):
        raise ValueError("holds no sections (run, model, data, ...) but something else")
    return {key: plain(value) for key, value in tree.items()}


def _with_bases(path: Path) -> list[Tree]:
    """What the file and the files below it say, the deepest base first."""
    layers: list[Tree] = []
    above: set[Path] = set()
    while True:
        if path.resolve() in above:
            raise ConfigError(f"base: {path} is a base of itself")
        if len(above) > _MOST_BASES:
            raise ConfigError(
                f"base: {path} lies below {len(above)} other files, at most {_MOST_BASES} can; put some into one file"
            )
        above.add(path.resolve())
        try:
            tree = _read(path)
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such configuration file") from None
        layers.insert(0, tree)
        base = tree.pop("base", None)
        if isinstance(base, Scalar):
            base = None if base.value is None else base.text
        if base is None:
            return layers
        if not isinstance(base, str):
            raise ConfigError(
                f"base={shown(plain(base))}: {path} can have one file below it, such as base: other.yaml"
            )
        try:
            below = path.parent / expand(base)
        except ValueError as error:
            raise ConfigError(f"base={shown(base)}: {error}") from None
        if not below.is_file():
            raise ConfigError(f"base={shown(base)}: no such file beside {path}")
        path = below


def _read(path: Path) -> Tree:
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: not a file, but a configuration is one")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"{path}: larger than {_MOST_BYTES >> 20} MiB, which no configuration is")
        tree = _parsed(content.decode())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: the configuration cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not a readable YAML configuration: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no sections (run, model, data, ...) but something else")
    return tree


def _of_override(override: str) -> Tree:
    """The tree of one `section.key=value`."""
    key, mark, text = override.partition("=")
    if not mark or not key or key.startswith("-"):
        raise ConfigError(
            f"{shown(override)} is not an override: write key=value, such as plan.compute_budget=0.5"
        )
    try:
        value = _parsed(text) if text.strip() else Scalar(None, text)
    except ValueError as error:
        raise ConfigError(
            f"{key}={shown(text)}: not readable as YAML ({error}); quote it: {key}='\"...\"'"
        ) from None
    first, *rest = key.split(".")
    if len(rest) > _DEEPEST:
        raise ConfigError(f"{shown(override)}: {len(rest)} sections inside each other; no key is that deep")
    for part in reversed(rest):
        value = {part: value}
    return {first: value}


def _parsed(text: str) -> Any:
    """Raises ValueError with one line."""
    try:
        tree = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except KeyError as error:
        raise ValueError(f"no such value: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        raise ValueError(f"{line}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if sum(1 for _ in islice(_values(tree), _MOST_VALUES + 1)) > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES} values")
    return tree


def _values(tree: Any, depth: int = 0) -> Iterator[Any]:
    """All values in the tree, repeated ones each time they occur. Raises ValueError if it is nested too deeply."""
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _values(value, depth + 1)


def _merged(below: Tree, above: Tree) -> Tree:
    """Keys of `above` win; mappings are merged."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


_REFERENCE = re.compile(r"\$\{([^{}]*)\}?")


def _resolved(value: Any, tree: Tree, path: tuple[str, ...]) -> Any:
    """`value` with the references in it replaced."""
    if isinstance(value, dict):
        return {key: _resolved(each, tree, (*path, key)) for key, each in value.items()}
    if isinstance(value, list):
        return [_resolved(each, tree, (*path, str(place))) for place, each in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value
    where = f"{'.'.join(path)}={shown(value)}"

    def referred(name: str) -> Scalar | str:
        found: Any = tree
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is None:
            raise ConfigError(
                f"{where}: ${{...}} stands for a key that the configuration sets, such as ${{run.seed}}, not for "
                f"environment variables or functions; write the value, or set the key on the command line"
            )
        if not isinstance(found, Scalar | str) or "${" in str(found) or len(str(found)) > _MOST_REFERRED:
            raise ConfigError(f"{where}: {name} is no short value of its own; write the value itself")
        return found

    whole = _REFERENCE.fullmatch(value)
    if whole is not None:
        return referred(whole[1])

    def written(match: re.Match[str]) -> str:
        found = referred(match[1])
        return found.text if isinstance(found, Scalar) else found

    return _REFERENCE.sub(written, value)
