"""The configuration's section `plan`: which planner, budgets and scores, and when a new plan is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from d2ft_hpc.interval import Interval, interval_text
from d2ft_hpc.planning.planner import Options, Planner
from d2ft_hpc.planning.table import PLANNERS
from d2ft_hpc.planning.tokens import TOKENS, TokenOptions, best_steps_share
from d2ft_hpc.score_table import FISHER, SCORES, WEIGHT_MAGNITUDE
from d2ft_hpc.settings import LONGEST, Fraction, PathText, Section, either, one_of


class ReplanConfig(Section):
    every: str | None = None
    """After how many epochs or steps a new plan is made, such as '1 epoch' or '100 steps'. null: one plan serves the
    whole run."""
    overlap: bool = False
    """true: the new plan is solved while training goes on under the old one. The clock decides which step is the first
    one under the new plan, and the results record it. false: the step at which a plan is due waits for it."""
    speeds: Literal["start", "watched"] = "start"
    """Which speeds of the ranks later plans reckon with. start: those of the first plan. watched: what each rank
    computed a second under the plan before, so that a rank that something slows down gets less. Watched speeds depend
    on the clock, so that a resumed run may get other plans."""

    @field_validator("every", mode="before")
    @classmethod
    def _check_interval(cls, text: Any) -> Any:
        return interval_text(text, "epochs or steps, such as '1 epoch' or '100 steps'")

    @property
    def interval(self) -> Interval | None:
        return None if self.every is None else Interval.read(self.every)


class PlanConfig(Section):
    planner: str = Field(
        default=TOKENS.name,
        description="\n".join(f"{entry.name}: {entry.about}." for entry in PLANNERS.values()),
    )
    options: SerializeAsAny[Options] = Field(default_factory=Options, validate_default=True)
    """Options that only the chosen planner reads. The tables below list them for each planner that has any."""
    file: PathText | None = None
    """A plan that was saved by `d2ft-hpc plan --save`, which the run follows. null: the run makes its own."""
    compute_budget: Fraction = 0.6
    """Share of the dense run's training FLOPs that each device may spend."""
    token_budget: Fraction | None = None
    """Share of the dense run's training FLOPs that would be left if only the images' size were changed. They begin
    small and end at data.image_size (`TokenOptions in d2ft_hpc/planning/tokens.py`). Planners that skip heads then
    keep compute_budget by both means together. Planner `tokens` needs no token_budget, and a plan from a file takes
    none. null: all images have full size."""
    communication_budget: Fraction | None = None
    """Share of the dense run's messages between subnets that a plan may send. null: no limit."""
    messages: Literal["by_head", "by_meeting"] = "by_head"
    """What counts as these messages. by_head: 1 for every head that is FULL and 0.5 for every one that is FORWARD_ONLY,
    which is the paper's cost model. by_meeting: what tensor-parallel ranks really send in engine.token_layout. That is
    less where only some of them, or none, have an active head in a block."""
    memory_budget: Fraction | None = None
    """Share of a dense micro-batch's activations that a device may keep for the backward. 1: no limit. null: planners
    `joint`, `makespan` and `depth` keep to the memory that each rank has left at the start, where that is too little
    for a dense micro-batch. A plan of another planner that exceeds a limit is refused."""
    costs: Literal["flops", "measured", "paper"] = "flops"
    """What planners reckon for FORWARD_ONLY and for what always runs. flops: counted FLOPs. measured: seconds of a
    short profile on every rank at the start, which also gives the ranks' speeds and is kept for the same hardware and
    model. paper: the paper's constants."""
    device_speed: list[Annotated[float, Field(gt=0)]] | None = None
    """The relative speed of each rank. It takes the place of measured or equal speeds."""
    forward_score: str = Field(
        default=FISHER.name,
        description="What a subnet's forward gives to a micro-batch, as a sum over its weights w with gradients g:\n"
        + "\n".join(f"{score.name}: {score.about}." for score in SCORES.values()),
    )
    backward_score: str = WEIGHT_MAGNITUDE.name
    """The same for a subnet's backward."""
    time_limit_seconds: float = Field(default=10.0, gt=0, le=LONGEST)
    """How long planners that search may take, in seconds. Then the best plan so far, or the greedy one, is taken."""
    replan: ReplanConfig = ReplanConfig()

    @field_validator("planner")
    @classmethod
    def _check_planner(cls, name: str) -> str:
        return one_of(PLANNERS, name)

    @field_validator("forward_score", "backward_score")
    @classmethod
    def _check_score(cls, name: str) -> str:
        return one_of(SCORES, name)

    @field_validator("options", mode="before")
    @classmethod
    def _check_options(cls, given: Any, info: ValidationInfo) -> Any:
        """Reads them as the planner's own."""
        planner = PLANNERS.get(info.data.get("planner", ""))
        if planner is None:  # which is fault enough
            return Options()
        values = given.model_dump() if isinstance(given, Options) else given
        if not isinstance(values, dict):
            raise PydanticCustomError("no_options", "input should be a section of options")
        known = planner.options.model_fields
        if unknown := [name for name in values if name not in known]:
            raise PydanticCustomError(
                "unknown_option",
                "planner {planner} has no option {name}; {fix}",
                {
                    "planner": planner.name,
                    "name": unknown[0],
                    "fix": f"it knows {either(known, 'and')}" if known else "it knows none: remove it",
                },
            )
        return planner.options.model_validate(values)

    @property
    def entry(self) -> Planner:
        """The planner itself."""
        return PLANNERS[self.planner]

    @property
    def token_share(self) -> float | None:
        """`token_budget`, or what it is for a planner that has no other; None: images have full size, or the one that a
        plan from a file says."""
        if self.file is not None:
            return None
        return self.compute_budget if self.entry.scales_images else self.token_budget

    def steps_share(self, epochs: int) -> float:
        """The share of a run's steps in which the planner does best (`train.steps_share=auto`)."""
        if self.file is not None or not self.entry.scales_images:
            return 1.0
        return best_steps_share(self.compute_budget, epochs)

    @property
    def sides(self) -> list[float] | None:
        """Of images in training, in units of data.image_size; None: they have full size, or a plan from a file says."""
        if self.token_share is None:
            return None
        return self.options.sides if isinstance(self.options, TokenOptions) else TokenOptions().sides

    def arguments(self, *, seed: int | Sequence[int]) -> dict[str, Any]:
        """Keyword arguments of the planner's function. seed: of planners that draw."""
        return self.entry.arguments(self.options, seed=seed, time_limit_seconds=self.time_limit_seconds)

    @model_validator(mode="after")
    def _check_token_budget(self) -> PlanConfig:
        if self.token_budget is None:
            return self
        if self.entry.scales_images:
            raise _of_section(
                f"token_budget={self.token_budget:g}: with planner={self.planner} it is compute_budget; remove it"
            )
        if self.entry.binding == "sample" or self.file is not None:
            asked = f"file={self.file}" if self.file is not None else f"planner={self.planner}"
            raise _of_section(
                f"token_budget={self.token_budget:g}: {asked} trains on images of full size; remove one of them"
            )
        if self.token_budget < self.compute_budget:
            raise _of_section(
                f"token_budget={self.token_budget:g}: is below compute_budget={self.compute_budget:g}, which would "
                f"leave the heads nothing to skip; use planner=tokens, or a larger one"
            )
        return self


def _of_section(text: str) -> PydanticCustomError:
    """A fault of several keys of a section, which begins with one of them; `explain` adds whose they are."""
    return PydanticCustomError("of_section", "{text}", {"text": text})
