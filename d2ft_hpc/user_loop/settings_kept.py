"""Settings of plans that saved states keep, so that a training that goes on with others is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from d2ft_hpc.errors import CheckpointError
from d2ft_hpc.user_loop.section import D2ftSection

_MAY_DIFFER = {"results", "compile", "cuda_graphs", "device_speed", "time_limit_seconds"}
"""Keys that do not say what a training is to cost."""


def settings_to_keep(section: D2ftSection) -> dict[str, Any]:
    """As JSON has them; none where a saved plan is followed, whatever the others say."""
    return {} if section.file is not None else section.model_dump(mode="json", exclude=_MAY_DIFFER)


def check_planner(kept: Mapping[str, Any], section: D2ftSection, where: str, given_to: str) -> None:
    """Raises CheckpointError where the state is of another planner. where: it is from. given_to: what takes the
    planner."""
    now, before = settings_to_keep(section).get("planner"), kept.get("planner")
    if None not in (now, before) and now != before:
        raise CheckpointError(
            f"{where}: the saved state is of planner {before!r}, this training has {now!r}: give {given_to} "
            f"planner={before!r}, or begin anew without the plan's saved state"
        )


def differences(kept: Mapping[str, Any], section: D2ftSection) -> str:
    """A line that names the keys whose values are others now; empty if there are none."""
    now, before = dict(_flat(settings_to_keep(section))), dict(_flat(kept))
    changed = [key for key in now if key in before and now[key] != before[key]]
    told = ", ".join(f"{key}={now[key]!r} (was {before[key]!r})" for key in changed)
    return f"goes on with other settings than those of the saved state: {told}" if told else ""


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
