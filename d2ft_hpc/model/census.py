"""Which of timm's models plans can run on, and why not on others: built without memory, nothing is downloaded."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from d2ft_hpc.errors import UnsupportedModelError
from d2ft_hpc.families.table import backbone_of, find_backbone, find_family
from d2ft_hpc.model.subnets import SubnetMap

_TRAINS, _ATTACHES = "supported", "supported in a loop of your own (d2ft_hpc.attach), not by d2ft-hpc train"
_WHY = {
    "Cait": "its heads are mixed with each other (talking heads), so that none can be skipped alone",
    "CrossVit": "two rows of blocks give each other tokens",
    "TNT": "a block has a transformer for the pixels of each patch inside",
    "Xcit": "attention is between channels, and a convolution over patches follows it in each block",
    "ConVit": "its blocks are of two kinds: gated ones with positions by head, and plain ones",
    "Gemma4VitClassifier": "its linear layers clamp what they get and what they give",
    "Gemma4VitEncoder": "its linear layers clamp what they get and what they give",
    "VisionTransformerSAM": "its blocks attend within windows, into which they cut the image themselves",
    "VOLO": "hierarchical, and most of its attention is not of queries and keys",
}
"""Reasons for models that no family knows, where there is more to say than how many heads they have."""
_NAMES_OF_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")


class Support(NamedTuple):
    """checkpoints: how many timm has. has_heads: it is a transformer, supported or not."""

    name: str
    kind: str
    answer: str
    is_supported: bool
    has_heads: bool
    checkpoints: int


def census(pattern: str = "*") -> Iterator[Support]:
    """The support of all models whose names match, or contain a pattern without wildcards, one after the other."""
    has_wildcard = any(character in pattern for character in "*?[")
    for name in timm.list_models(pattern if has_wildcard else f"*{pattern}*"):
        yield support_of(name)


def support_of(name: str) -> Support:
    """name: of an architecture that timm knows, without a tag."""
    with _without_memory():
        model = timm.create_model(name)
    supported, answer = _answer(model)
    checkpoints = len(
        [known for known in timm.list_pretrained(f"{name}.*") if not known.endswith(".untrained")]
    )
    return Support(
        name,
        type(model).__name__,
        answer,
        supported,
        supported or bool(_heads_and_widths(model)[0]),
        checkpoints,
    )


def described(found: Iterable[Support]) -> str:
    """Totals, and the names by kind of model and answer."""
    rows = list(found)
    groups: dict[tuple[bool, str, str], list[Support]] = {}
    for row in rows:
        groups.setdefault((not row.is_supported, row.kind, row.answer), []).append(row)
    supported, with_heads = [row for row in rows if row.is_supported], [row for row in rows if row.has_heads]
    lines = [
        f"timm {timm.__version__}: {_sums(supported)} supported, of {_sums(with_heads)} with attention heads and "
        f"{_sums(rows)} in all"
    ]
    for (_, kind, answer), members in sorted(groups.items()):
        lines += ["", f"{kind}, {_sums(members)}: {answer}"]
        names = " ".join(member.name for member in members)
        lines += textwrap.wrap(
            names, 112, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )
    return "\n".join(lines)


def _sums(rows: list[Support]) -> str:
    checkpoints = sum(row.checkpoints for row in rows)
    return f"{len(rows)} name{'s' * (len(rows) != 1)} ({checkpoints} checkpoint{'s' * (checkpoints != 1)})"


def _answer(model: nn.Module) -> tuple[bool, str]:
    if find_backbone(model) is None:
        return False, _why_unknown(model)
    try:
        SubnetMap.of(backbone_of(model))
    except UnsupportedModelError as error:
        reasons = str(error).partition("is not supported: ")[2].partition(" Supported: ")[0].rstrip(".")
        return False, re.sub(r" \(and \d+ like it\)", "", reasons)
    trains = (
        find_family(model) is not None
        and hasattr(model, "get_classifier")
        and not hasattr(model, "head_dist")
    )
    return True, _TRAINS if trains else _ATTACHES


def _why_unknown(model: nn.Module) -> str:
    if why := _WHY.get(type(model).__name__):
        return why
    heads, widths = _heads_and_widths(model)
    if not heads:
        return "none of its modules has a number of heads: no attention, or one of another kind"
    if len(heads) > 1 or len(widths) > 1:
        return "hierarchical: heads or channels are not as many in all of its stages"
    return "no family knows its blocks"


def _heads_and_widths(model: nn.Module) -> tuple[set[int], set[int]]:
    """The numbers of heads that the model's modules have, and the numbers of channels that these modules get."""
    heads: set[int] = set()
    widths: set[int] = set()
    for module in model.modules():
        own = next(
            (getattr(module, name) for name in _NAMES_OF_HEADS if type(getattr(module, name, None)) is int), 0
        )
        if own > 0:
            heads.add(own)
            widths.update(
                child.weight.shape[1]
                for child in module.children()
                if isinstance(child, nn.Linear | nn.Conv2d)
            )
    return heads, widths


class _Uninitialised(TorchFunctionMode):
    """Inside, in-place initialisation of tensors without memory is left out, which takes half of the time of building
    or more."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.startswith("_") and name != "requires_grad_":
            given = args[0] if args else None
            if isinstance(given, Tensor) and given.is_meta:
                return given
        return func(*args, **(kwargs or {}))


@contextmanager
def _without_memory() -> Iterator[None]:
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), _Uninitialised():
            yield
    finally:
        logger.setLevel(level)
