"""What sections of the configuration are made of, wherever they are declared."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(gt=0, le=1)]
_MOST = 2**31 - 1


def of_percent(value: Any) -> str:
    """What to add to the refusal of a value in per cent where a share was asked for; empty for other values."""
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        return ""
    is_percent = 2 <= number <= 100 or (text.endswith("%") and 0 < number <= 100)
    return f"; write it as a share, {number / 100:g} for {number:g} %" if is_percent else ""


class Section(BaseModel):
    """A part of the configuration: unknown keys and wrong types are errors, values never change (`~` in paths does)."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        """Numbers of things: larger ones overflow somewhere."""
        if isinstance(value, int) and value > _MOST:
            raise PydanticCustomError("too_large", "input should be at most {most}", {"most": _MOST})
        return value
