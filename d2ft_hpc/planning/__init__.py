"""From scores, costs and budgets (`PlanProblem`) to what every head runs on every row (`SkipPlan`)."""

from d2ft_hpc.planning.greedy import solve_greedy
from d2ft_hpc.planning.joint import solve_joint
from d2ft_hpc.planning.paper import solve_paper
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.problem import BUDGET_EPSILON, PlanProblem, check
from d2ft_hpc.planning.random_schedule import solve_random
from d2ft_hpc.planning.solve import Planner, solve

__all__ = [
    "BUDGET_EPSILON",
    "Operation",
    "PlanProblem",
    "Planner",
    "SkipPlan",
    "check",
    "solve",
    "solve_greedy",
    "solve_joint",
    "solve_paper",
    "solve_random",
]
