"""Planning by depth: the top blocks of a row train, the blocks below only run forward.

FORWARD_ONLY below the lowest FULL block biases no gradient: whatever flows down to a FULL head has passed no
skipped one.
"""

from __future__ import annotations

import math
import time

import numpy as np

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.arrays import Floats, Ints, Operations
from d2ft_hpc.planning.bounds import plan_with_bound
from d2ft_hpc.planning.highs import OPTIMAL
from d2ft_hpc.planning.multiple_choice import choose, share_of_time
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.planner import Planner
from d2ft_hpc.planning.prices import Limit, scarce
from d2ft_hpc.planning.problem import PlanProblem


def solve_depth(problem: PlanProblem, *, time_limit_seconds: float = 10.0) -> SkipPlan:
    """Maximise the objective of `solve_joint` by one depth for each row: its top blocks FULL, those below
    FORWARD_ONLY.

    The budgets of every device hold. Bound and gap are those of plans of this form. Raises PlanError if an option
    is out of range, or if a device's budgets do not pay for FORWARD_ONLY everywhere.
    """
    if not time_limit_seconds > 0:
        raise PlanError(f"time_limit_seconds must be > 0, got {time_limit_seconds}.")
    deadline = time.monotonic() + time_limit_seconds
    blocks = problem.forward_score.shape[1]
    depths = np.arange(blocks + 1)
    is_full = np.arange(blocks) >= blocks - depths[:, None]  # [option, block]
    # [option, block]
    option_operations = np.where(is_full, Operation.FULL, Operation.FORWARD_ONLY).astype(np.uint8)
    forward_gain, backward_gain = (gain.sum(axis=2) for gain in problem.gains())
    value = forward_gain.sum(axis=1, keepdims=True) + backward_gain @ is_full.T

    operations = np.empty(problem.forward_score.shape, dtype=np.uint8)
    bound, statuses = 0.0, set()
    for replica in range(problem.replicas):
        rows = slice(replica, None, problem.replicas)
        limits = _limits(problem, replica, option_operations)
        its_deadline = share_of_time(deadline, problem.replicas - replica)
        option, its_bound, status = _best_depths(value[rows], limits, depths, its_deadline)
        bound += its_bound
        operations[rows] = option_operations[option][:, :, None]
        statuses.add(status)
    return plan_with_bound(problem, operations, planner=DEPTH.name, status=statuses, bound=bound)


def _best_depths(
    value: Floats, limits: list[Limit], depths: Ints, deadline: float
) -> tuple[Ints, float, str]:
    """The option of each row, int64 [row], a bound on what any choice of options gives, and how the search ended."""
    total = _most_blocks(limits, depths, len(value))
    if total is None:
        choice = choose(value, limits, deadline=deadline)
        return choice.option, choice.bound, choice.status
    option = _best_options(value, depths, total)
    return option, float(value[np.arange(len(option)), option].sum()), OPTIMAL


def _limits(problem: PlanProblem, replica: int, option_operations: Operations) -> list[Limit]:
    """What option 0, used everywhere, leaves of every budget of every device of a replica."""
    rows = problem.slots
    everything = np.zeros(rows, dtype=np.int64)
    limits: list[Limit] = []
    for stage, rank in np.ndindex(problem.stages, problem.ranks):
        device = (replica * problem.stages + stage) * problem.ranks + rank
        heads = np.where(problem.stage == stage, (problem.rank == rank).sum(axis=1), 0)  # [block]
        for resource, costs, budget in (
            ("compute", problem.compute_cost, problem.budgets_to_plan[device, 0]),
            ("communication", problem.communication_cost, problem.budgets_to_plan[device, 1]),
        ):
            use = np.asarray(costs)[option_operations] @ heads  # [option]
            if resource == "communication":
                here = option_operations[:, problem.stage == stage]  # [option, block]
                for cost, kind in zip(
                    problem.meeting_cost, (Operation.FORWARD_ONLY, Operation.FULL), strict=True
                ):
                    use = use + cost * (here >= kind).sum(axis=1)
            least = use[0] * rows
            if least > budget:
                raise PlanError(
                    f"The {resource} budget of {problem.device_names[device]} is {budget:g}, but FORWARD_ONLY in "
                    f"every block of every row uses {least:g}. The least feasible {resource} budget is "
                    f"{problem.least_budget(resource, device, least)} of its dense step."
                )
            limits.append(Limit(use - use[0], everything, np.array([budget - least])))
        in_row = (option_operations == Operation.FULL) @ heads
        limits.append(
            Limit(in_row.astype(float), np.arange(rows), np.full(rows, problem.memory_budget[device]))
        )
    return scarce(limits)


def _most_blocks(limits: list[Limit], depths: Ints, rows: int) -> int | None:
    """The largest sum of all rows' depths that the limits allow; None if the limits cannot be written as such a
    sum."""
    total = rows * int(depths[-1])
    for limit in limits:
        of_block = limit.use[-1] / depths[-1]
        if len(limit.most) > 1 or not np.allclose(limit.use, of_block * depths, rtol=1e-12, atol=0):
            return None
        total = min(total, math.floor(limit.most[0] / of_block * (1 + 1e-12)))
    return total


def _best_options(value: Floats, depths: Ints, total: int) -> Ints:
    """The options with the largest total value among those whose depths add up to at most `total`: int64 [row].

    Row by row: the best value for every sum of depths so far (dynamic programming), then back from the best end.
    """
    best = np.zeros(total + 1)  # [sum of depths at most]
    chosen = np.zeros((len(value), total + 1), dtype=np.int64)
    for row in range(len(value)):
        candidates = np.full((len(depths), total + 1), -np.inf)
        for option, depth in enumerate(depths[depths <= total]):
            candidates[option, depth:] = best[: total + 1 - depth] + value[row, option]
        chosen[row] = candidates.argmax(axis=0)
        best = candidates.max(axis=0)
    options = np.empty(len(value), dtype=np.int64)
    for row in reversed(range(len(value))):
        options[row] = chosen[row, total]
        total -= int(depths[options[row]])
    return options


DEPTH = Planner(
    "depth",
    "one depth for each micro-batch: the blocks above it FULL, those below FORWARD_ONLY",
    solve_depth,
    fits_memory=True,
)
