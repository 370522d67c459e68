"""All keys of a configuration as Markdown, from the schema's own docstrings.

`python -m tests.key_reference > configs/README.md` writes the reference anew.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from d2ft_hpc.config import RunConfig
from d2ft_hpc.config_faults import section_of
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.planning.table import PLANNERS
from d2ft_hpc.user_loop.section import D2ftSection

_INTRODUCTION = """\
# Configurations

Copy the file that is nearest to what you want to do, and set what differs in the file or on the command line.

| file | what it trains |
|---|---|
| `demo.yaml` | the small model that comes with the package, on handwritten digits; runs on a laptop |
| `demo_pipeline.yaml`, `demo_tensor.yaml` | the same, cut into two pipeline stages or over two tensor-parallel ranks |
| `dinov2_vits14.yaml`, `..._vitb14`, `..._vitl14` | DINOv2 models at 224 pixels, on images packed into one file |
| `vits16.yaml`, `vitb16.yaml`, `vitl16.yaml` | the same for ViT models that were pretrained on ImageNet-21k |
| `paper/*.yaml` | a file for each method that [was compared](../analysis/paper_table/README.md) with D2FT on CIFAR-10 |
| `deepspeed/*.json` | DeepSpeed's files with a `"d2ft"` section, for [your scripts](../d2ft_hpc/user_loop/README.md) |

The methods in `paper/` are the paper's plan, its baselines (random scheduling, pruning by M and M/G, routing after
GShard) and rivals at equal compute (fewer steps, fewer samples, small batches, selective backprop, low resolution, last
blocks, stochastic depth), and the same for LoRA. `standard.yaml` is the dense run that they are based on.

A setting on the command line comes after the file and is written as `section.key=value`, for instance
`plan.compute_budget=0.5`. A line `base: OTHER.yaml` in a file takes everything from that other file which the file does
not set itself. `${section.key}` inside a text stands for the value of that key. A key that does not exist, a value of
the wrong type or a value out of range ends the job before any rank starts to work; the message names the key, the value
and the nearest valid key.

In the tables, a *subnet* is an attention head with its part of the MLP. A plan says what each subnet does with a
micro-batch: FULL runs it forward and backward, FORWARD_ONLY runs it forward without gradient, SHORTCUT leaves it out.
*Dense* means that all subnets are FULL. A *replica* is the ranks that hold one copy of the model together.

The tables are made from the schema by `python -m tests.key_reference > configs/README.md`.
"""
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    type(None): "null",
    Any: "anything",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def document() -> str:
    """The page `configs/README.md`."""
    parts = [_INTRODUCTION]
    for name, info in RunConfig.model_fields.items():
        section = section_of(info.annotation)
        assert section is not None
        parts.append(f"\n## `{name}`\n\n{_table(section, f'{name}.')}")
        if name == "plan":
            parts.extend(_planner_options())
    own = [key for key in D2ftSection.model_fields if key not in PlanConfig.model_fields]
    parts.append(
        '\n## The `"d2ft"` section of a DeepSpeed configuration\n\n'
        "It has the keys of `plan` above, without the `plan.` before them, and these.\n\n"
        f"{_table(D2ftSection, '', own)}"
    )
    return "".join(parts)


def _planner_options() -> Iterator[str]:
    planners_of: dict[type[BaseModel], list[str]] = {}
    for planner in PLANNERS.values():
        if planner.options.model_fields:
            planners_of.setdefault(planner.options, []).append(f"`{planner.name}`")
    for options, names in planners_of.items():
        yield f"\n### `plan.options` of planner {', '.join(names)}\n\n{_table(options, 'plan.options.')}"


def _table(section: type[BaseModel], prefix: str, names: list[str] | None = None) -> str:
    rows = ["| key | default | values | what |", "|---|---|---|---|"]
    rows += [
        f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |"
        for row in _rows(section, prefix, names)
    ]
    return "\n".join(rows) + "\n"


def _rows(section: type[BaseModel], prefix: str, names: list[str] | None) -> Iterator[tuple[str, ...]]:
    for name, info in section.model_fields.items():
        if names is not None and name not in names:
            continue
        inner = section_of(info.annotation)
        told = _paragraphs(info.description or "")
        if inner is None or not inner.model_fields or info.default is None:
            default = "**required**" if info.is_required() else f"`{_default(info)}`"
            values = "settings" if inner else _values(info.annotation, info.metadata)
            yield f"`{prefix}{name}`", default, values, told
        if inner is not None:
            yield from _rows(inner, f"{prefix}{name}.", None)


def _default(info: FieldInfo) -> str:
    default = info.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        default = default.model_dump()
    return default if isinstance(default, str) else json.dumps(default)


def _values(annotation: Any, metadata: list[Any]) -> str:
    """In words, such as "whole number, at least 1, or null"."""
    if hasattr(annotation, "__metadata__"):
        return _values(annotation.__origin__, [*annotation.__metadata__, *metadata])
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return ", or ".join(_values(each, metadata if each is not type(None) else []) for each in arguments)
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if origin is list:
        return f"list of: {_values(arguments[0], [])}"
    if origin is dict:
        return "settings"
    return ", ".join([_WORDS.get(annotation, annotation.__name__), *_bounds(metadata)])


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for each in metadata:
        if isinstance(each, FieldInfo):
            yield from _bounds(each.metadata)
        for name, words in _BOUNDS.items():
            bound = getattr(each, name, None)
            if bound is not None:
                yield f"{words} {bound if isinstance(bound, int) else f'{bound:g}'}"


def _paragraphs(text: str) -> str:
    """The docstring as one line, except that "name: what it means." at the beginning of a line begins one in the
    table too."""
    told = ""
    for line in text.splitlines():
        entry = told.endswith((".", ":")) and re.match(r"\w+: ", line)
        told += ("<br>" if entry else " " if told else "") + line.strip()
    return told


if __name__ == "__main__":
    print(document(), end="")
