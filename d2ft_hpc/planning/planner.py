"""What every planner says of itself, in its own file; `table.py` lists them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import Field

from d2ft_hpc.planning.plan import SkipPlan
from d2ft_hpc.settings import Section


class Options(Section):
    """What one planner alone reads of the configuration, as `plan.options`. Fields are named as the parameters of the
    planner's function and have the same defaults."""


class WithShortcuts(Options):
    """Of several planners."""

    most_shortcut: float = Field(default=1.0, ge=0, le=1)
    """Most of a device's heads in a block that may be SHORTCUT in a micro-batch."""


@dataclass(frozen=True)
class Planner:
    """One way to make plans. It holds all that other modules ask about a planner, so that none of them compares
    names."""

    name: str
    about: str
    """For users, who choose by it."""
    solve: Callable[..., SkipPlan]
    """Takes a `PlanProblem` and keyword options; with `binding="sample"` no problem, but numbers of samples."""
    options: type[Options] = Options
    reads_scores: bool = True
    keeps_budgets: bool = True
    """False: there is nothing to plan by heads."""
    scales_images: bool = False
    """Spends all of plan.compute_budget by choosing the number of tokens."""
    makes_few_shapes: bool = False
    """Whether a run's micro-batches are of a few kinds, for each of which CUDA graphs can be kept."""
    fits_memory: bool = False
    """Gives a rank with little memory fewer FULL subnets. Plans of other planners are refused where they exceed the
    memory."""
    needs_scores_for: tuple[str, ...] = ()
    """Budgets, by their names in the configuration, that the planner may miss: only the plan made from real scores
    shows it."""
    binding: Literal["slot", "sample"] = "slot"
    """What a row of its plans is: a micro-batch, or a sample of a batch, drawn in each step."""

    @property
    def plans_heads(self) -> bool:
        """Whether its plans say which heads of a micro-batch run: a problem is all that it needs."""
        return self.binding == "slot" and not self.scales_images

    @cached_property
    def parameters(self) -> list[str]:
        """Names of the keyword options that `solve` takes."""
        return [name for name in inspect.signature(self.solve).parameters if name != "problem"]

    @cached_property
    def needed(self) -> list[str]:
        """The parameters without which it cannot plan."""
        parameters = inspect.signature(self.solve).parameters
        return [name for name in self.parameters if parameters[name].default is inspect.Parameter.empty]

    def arguments(
        self, options: Options, *, seed: int | Sequence[int], time_limit_seconds: float
    ) -> dict[str, Any]:
        """Keyword arguments of `solve`: the planner's own options, and those common ones that it takes."""
        of_all = {"seed": seed, "time_limit_seconds": time_limit_seconds}
        return options.model_dump() | {
            name: value for name, value in of_all.items() if name in self.parameters
        }
