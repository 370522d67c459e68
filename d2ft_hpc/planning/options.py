"""Options that several planners have in common."""

from __future__ import annotations

from pydantic import Field

from d2ft_hpc.planning.planner import Options


class WithShortcuts(Options):
    most_shortcut: float = Field(default=1.0, ge=0, le=1)
    """Most of a device's heads in a block that may be SHORTCUT in a micro-batch."""
