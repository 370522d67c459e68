"""The configuration of a run that an older version began, in today's keys."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from d2ft_hpc.config import RunConfig
from d2ft_hpc.errors import ConfigError

_LORA_LAYERS = {"qkv", "proj", "fc1", "fc2"}


def in_todays_keys(before: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """before: what the run's config.yaml holds. config: with which it is to go on.

    Raises ConfigError where a key that is gone had a value that no key of today can say.
    """
    now = copy.deepcopy(dict(before))
    data, plan, model = (values_of(now, name) for name in ("data", "plan", "model"))
    for name in ("mixup_alpha", "cutmix_alpha"):
        if alpha := data.pop(name, 0):
            data["timm"] = {**(data.get("timm") or {}), name: alpha}
    replan = plan.get("replan")
    if isinstance(replan, dict):
        unit, every = replan.pop("unit", None), replan.get("every")
        if unit is not None and every is not None:
            replan["every"] = f"{every} {unit}"
    held_out = config.data.validation_fraction > 0
    draws = held_out or config.data.train_fraction < 1
    gone = {
        "data.evaluate_on": (data.pop("evaluate_on", None), config.data.evaluated_split),
        "data.split_seed": (data.pop("split_seed", None), config.run.seed if draws else None),
        "plan.probe_batches": (plan.pop("probe_batches", None), 1),
        "plan.warmup_share": (plan.pop("warmup_share", None), 0),
    }
    for key, (value, today) in gone.items():
        if None not in (value, today) and value != today:
            raise _gone(config, f"{key}={value}", today)
    lora = model.get("lora")
    if isinstance(lora, dict) and set(lora.pop("layers", _LORA_LAYERS)) != _LORA_LAYERS:
        raise _gone(config, "model.lora.layers", "all layers")
    return now


def values_of(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Empty where a file holds something else in its place."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _gone(config: RunConfig, said: str, today: Any) -> ConfigError:
    return ConfigError(
        f"{said}: the run in {config.run_folder} was begun with it by an older version, and this one does as "
        f"with {today}: go on with the version that began it, choose another run.name, or delete the folder to begin "
        f"anew"
    )
