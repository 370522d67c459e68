"""The "d2ft" section of a DeepSpeed configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

from d2ft_hpc.config_faults import validated
from d2ft_hpc.engines.deepspeed_keys import deepspeed_sections
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.families.table import family_of
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.planning.samples import SampleOptions
from d2ft_hpc.score_table import SCORES
from d2ft_hpc.settings import PathText

SECTION = "d2ft"

_IN_STEPS = [score.name for score in SCORES.values() if score.in_steps]
_USABLE: dict[str, list[Any]] = {
    "forward_score": _IN_STEPS,
    "backward_score": [*_IN_STEPS, *(score.name for score in SCORES.values() if not score.reads_gradients)],
    "costs": ["flops"],
}
"""Values of the keys that need a run of ours for their others."""


class D2ftSection(PlanConfig):
    """Planning as in a run's `plan` section, and what `attach` takes."""

    embeddings: Literal["frozen", "complete_path", "trained"] = "frozen"
    """Parameters below every block: frozen, trained by micro-batches that are FULL everywhere, or trained by all."""
    compile: bool = False
    """Whether torch.compile makes kernels of the blocks, as engine.compile does in `d2ft-hpc train`."""
    cuda_graphs: bool = False
    """Whether blocks are launched as CUDA graphs on a GPU. A second backward through one forward is refused then."""
    total_steps: int | None = Field(default=None, gt=0)
    """Steps of the optimizer in the whole training; plans by tokens, whose images grow through it, need to know. null:
    `total_num_steps` of DeepSpeed's scheduler, if it has one."""
    results: PathText | None = None
    """Folder of the loop's `results.h5`; null: no record."""
    seed: int = Field(default=0, ge=0)
    """Of planners `random` and `samples`."""


def split(config: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], D2ftSection]:
    """A DeepSpeed configuration (a dict, or the path of a JSON file) without its "d2ft" section, and the section.

    Raises ConfigError where the file is missing or no JSON, or a section has unknown keys or bad values.
    """
    settings = dict(config) if isinstance(config, Mapping) else _read(Path(config))
    for key in settings:
        if key != SECTION and str(key).lower() == SECTION:
            raise ConfigError(f"{key}: no section of DeepSpeed's; write {SECTION}")
    section = settings.pop(SECTION, {})
    try:
        settings = deepspeed_sections(settings)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if isinstance(section, Mapping) and "micro_batches" in section:
        raise ConfigError(
            f"{SECTION}.micro_batches={section['micro_batches']!r}: DeepSpeed's gradient_accumulation_steps says it; "
            f"remove it"
        )
    return settings, parse_section(section, f"{SECTION}.")


def parse_section(section: Any, where: str) -> D2ftSection:
    """Raises ConfigError where it has unknown keys or bad values, or asks for what a loop of one's own cannot do;
    `where` stands before the keys in messages."""
    if isinstance(section, Mapping) and isinstance(section.get("plan"), Mapping):
        to = f"the {SECTION} section itself" if where else "attach"
        raise ConfigError(
            f"{where}plan: no section here; give its keys to {to}, such as {where}compute_budget"
        )
    parsed = validated(D2ftSection, section, where)
    for key, usable in _USABLE.items():
        value = getattr(parsed, key)
        if value not in usable:
            raise ConfigError(
                f"{where}{key}={value!r}: only d2ft-hpc train can do that; "
                f"in a loop of your own: {', '.join(map(repr, usable))}"
            )
    if parsed.replan.overlap:
        raise ConfigError(
            f"{where}replan.overlap=true: only d2ft-hpc train solves while it trains; remove it"
        )
    if parsed.replan.interval is not None and parsed.replan.interval.unit == "epoch":
        raise ConfigError(
            f"{where}replan.every={parsed.replan.every!r}: only d2ft-hpc train knows its epochs; count steps, such as "
            f"'100 steps'"
        )
    return parsed


def require_options_for(model: nn.Module, section: D2ftSection, where: str) -> None:
    """Raises ConfigError where a setting is about images, and the model, of a known family, reads text."""
    if family_of(model).takes_images:
        return
    reads = f"it is for images, and {type(model).__name__} reads text"
    if section.sides is not None:
        key = "planner" if section.entry.scales_images else "token_budget"
        raise ConfigError(
            f"{where}{key}={getattr(section, key)!r}: {reads}: use planner='samples', or one by heads, such as "
            f"planner='joint', without token_budget"
        )
    if isinstance(section.options, SampleOptions):
        for key in ("image_size", "weights"):
            value = getattr(section.options, key)
            if value != getattr(SampleOptions(), key):
                raise ConfigError(f"{where}options.{key}={value!r}: {reads}: remove it")


def require_length(section: D2ftSection, where: str) -> None:
    """Raises ConfigError where images are to grow through a training of a length that nobody has said."""
    if section.token_share is not None and section.total_steps is None and section.file is None:
        if where and not section.model_fields_set - {"total_steps"}:
            raise ConfigError(
                f'{SECTION}: DeepSpeed\'s configuration has no such section, or an empty one; add "{SECTION}": '
                f'{{"compute_budget": {section.compute_budget:g}, "total_steps": N}}, N steps of the optimizer in all'
            )
        raise ConfigError(
            f"{where}total_steps: planner {section.planner!r} lets images grow through the training; say how many "
            f"steps of the optimizer it has (total_steps), or use another planner"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: not a file, but DeepSpeed's configuration is one")
        settings = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ConfigError(f"{path}: DeepSpeed's configuration is nested too deeply") from None
    except OSError as error:
        raise ConfigError(f"{path}: DeepSpeed's configuration cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: DeepSpeed's configuration is no JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: DeepSpeed's configuration must be an object")
    return settings


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """As DeepSpeed does, which refuses keys that are there twice."""
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"key {twice!r} is there twice")
    return dict(pairs)
