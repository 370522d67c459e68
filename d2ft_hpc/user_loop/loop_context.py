"""What the plans of a loop depend on that is not `d2ft-hpc train`."""

from __future__ import annotations

from d2ft_hpc.lifecycle import PlanContext, PlanCosts
from d2ft_hpc.lifecycle.foresight import curve_of
from d2ft_hpc.metering import StepCosts
from d2ft_hpc.parallel.rank_layout import Placement
from d2ft_hpc.user_loop.section import D2ftSection


def loop_context(
    section: D2ftSection,
    costs: StepCosts,
    placement: Placement,
    *,
    slots: int,
    micro_batch_size: int,
    replicas_meet: bool,
    where: str,
) -> PlanContext:
    """costs: of the whole model. The others are the `PlanContext`'s. Raises ConfigError as `PlanCosts.counted` and
    `curve_of`."""
    return PlanContext(
        section,
        placement,
        costs,
        PlanCosts.counted(costs, section.device_speed, placement.layout.world_size),
        slots=slots,
        micro_batch_size=micro_batch_size,
        seed=section.seed,
        replicas_meet=replicas_meet,
        total_steps=section.total_steps,
        curve=curve_of(section, costs, [1] * (section.total_steps or 0), where),
        where=where,
    )
