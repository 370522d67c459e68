"""What a step really computes and sends, counted while it runs."""

from d2ft_hpc.metering.flops import StepCosts, measure_costs
from d2ft_hpc.metering.meter import Metered, meter

__all__ = ["Metered", "StepCosts", "measure_costs", "meter"]
