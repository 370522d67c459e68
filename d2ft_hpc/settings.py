"""The base classes and types of the configuration's sections, wherever these are declared."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from d2ft_hpc.paths import expand

Fraction = Annotated[float, Field(gt=0, le=1)]
PathText = Annotated[str, AfterValidator(expand)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""As numpy takes it."""
LONGEST = 1e7
"""The longest waiting time, in seconds or minutes: values far beyond a job's life overflow clocks."""
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
        """Refuses whole numbers that would overflow somewhere."""
        if isinstance(value, int) and value > _MOST:
            raise PydanticCustomError("too_large", "input should be at most {most}", {"most": _MOST})
        return value


def either(names: Iterable[str], word: str = "or") -> str:
    """`a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last


def one_of(table: Iterable[str], name: str) -> str:
    """The name, which must be in the table."""
    if name not in table:
        raise PydanticCustomError("unknown", "{fix}", {"fix": meant(name, table)})
    return name


def meant(name: str, table: Iterable[str]) -> str:
    """What to write in place of a wrong name: the most similar one of the table, or which there are."""
    near = difflib.get_close_matches(name, names := list(table), n=1)
    return f"did you mean {near[0]!r}?" if near else f"input should be {either(map(repr, names))}"
