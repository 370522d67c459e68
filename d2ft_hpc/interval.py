"""How often something is done, as a configuration says it: '10 minutes', '1 epoch', '50 steps'."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from pydantic_core import PydanticCustomError

from d2ft_hpc.settings import LONGEST


class Interval(NamedTuple):
    """So many minutes, or whole epochs or steps."""

    number: float
    unit: str
    """minute, epoch or step."""

    @staticmethod
    def read(text: str) -> Interval | None:
        """None if it is none."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(minute|epoch|step)s?", text)
        if not found:
            return None
        number, unit = float(found[1]), found[2]
        whole = unit == "minute" or number.is_integer()
        return Interval(number, unit) if whole and 0 < number <= LONGEST else None


def interval_text(text: Any, units: str) -> Any:
    """units: that are allowed, with an example, for the message."""
    if text is None:
        return None
    interval = Interval.read(text) if isinstance(text, str) else None
    if interval is None or f"{interval.unit}s" not in units:
        raise PydanticCustomError("no_interval", "write so many {units}", {"units": units})
    return text
