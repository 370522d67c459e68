"""From scores, costs and budgets (`PlanProblem`) to what every head runs on every row (`SkipPlan`)."""

from d2ft_hpc.planning.joint import solve_joint
from d2ft_hpc.planning.placement import in_order, place, spread
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.pose import Budgets, Devices, GivenShares, pose
from d2ft_hpc.planning.problem import BUDGET_EPSILON, PlanProblem, check
from d2ft_hpc.planning.samples import plan_samples
from d2ft_hpc.planning.simulate import simulate
from d2ft_hpc.planning.solve import solve
from d2ft_hpc.planning.table import PLANNERS

__all__ = [
    "BUDGET_EPSILON",
    "PLANNERS",
    "Budgets",
    "Devices",
    "GivenShares",
    "Operation",
    "PlanProblem",
    "SkipPlan",
    "check",
    "in_order",
    "place",
    "plan_samples",
    "pose",
    "simulate",
    "solve",
    "solve_joint",
    "spread",
]
