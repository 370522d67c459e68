"""Planning for fixed shapes: a block runs equally many heads in all rows, one of two numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from pydantic import Field

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.arrays import Floats, Ints
from d2ft_hpc.planning.bounds import plan_with_bound
from d2ft_hpc.planning.levels import Levels
from d2ft_hpc.planning.lockstep import LockstepStage, lockstep_stages, meeting_replicas, step_limits
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.planner import Planner, WithShortcuts
from d2ft_hpc.planning.problem import BUDGET_EPSILON, PlanProblem


def solve_static(problem: PlanProblem, *, most_shortcut: float = 1.0, heads_multiple: int = 1) -> SkipPlan:
    """Maximise the objective of `solve_joint` with one level for each block, the same in all rows of a replica.

    A level says how many heads of each operation every rank runs. Blocks have one of two neighbouring levels, the
    higher one where it gives most: kernels are made for two shapes, and the budget is used up all the same. Stages
    whose ranks differ in speed have levels of their own.

    Which heads run follows the scores. All levels and their neighbours are tried, so the plan is the best of its kind:
    bound = objective, gap = 0.

    heads_multiple: numbers of heads are multiples of it, or all of a rank's (matrix products on a GPU run in tiles).
    Other options and errors are those of `solve_makespan`.
    """
    if heads_multiple < 1:
        raise PlanError(f"heads_multiple is a number of heads from 1, got {heads_multiple}.")
    operations = np.full(problem.forward_score.shape, Operation.SHORTCUT, dtype=np.uint8)
    gains = problem.gains()
    for replicas in meeting_replicas(problem):
        stages = [
            replace(stage, levels=stage.levels.in_multiples(heads_multiple))
            for stage in lockstep_stages(problem, replicas, gains, most_shortcut)
        ]
        for alike in [stages] if _have_the_same_levels(stages) else [[stage] for stage in stages]:
            pairs = _neighbours(alike[0].levels)
            value, levels = _best_pair(problem, alike, *pairs)
            if value == -np.inf:
                raise PlanError(  # the budgets pay for a single head: `lockstep_stages` has checked it
                    f"heads_multiple={heads_multiple}: no such number of heads keeps the budgets and most_shortcut. "
                    f"Lower it, or raise one of these."
                )
            for stage, level in zip(alike, levels, strict=True):
                stage.write(np.tile(level, stage.slots), operations)
    bound = problem.objective(operations)
    return plan_with_bound(problem, operations, planner=STATIC.name, status="optimal", bound=bound)


def _neighbours(levels: Levels) -> tuple[Ints, Ints]:
    """Pairs of levels, lower and upper, int64 [pair] each: the same one; the next more FORWARD_ONLY, FULL, or both."""
    runs, full = (
        np.unique(heads.sum(axis=1), return_inverse=True)[1]
        for heads in (levels.forward_heads, levels.backward_heads)
    )
    place = np.full((runs.max() + 2, full.max() + 2), -1)
    place[runs, full] = np.arange(len(runs))
    steps = ((0, 0), (1, 0), (0, 1), (1, 1))
    upper = np.concatenate([place[runs + more, full + trained] for more, trained in steps])
    lower = np.tile(np.arange(len(runs)), len(steps))
    return lower[upper >= 0], upper[upper >= 0]


def _best_pair(
    problem: PlanProblem, stages: list[LockstepStage], lower: Ints, upper: Ints
) -> tuple[float, list[Ints]]:
    """The total value of the best pair (lower, upper) of levels that all stages share, -inf if none fits; and each
    stage's levels, int64 [block]."""
    total = np.zeros(len(lower))
    ranked, counts = [], []
    for stage in stages:
        value = stage.levels.value.reshape(stage.slots, len(stage.blocks), -1).sum(axis=0)  # [block, level]
        gain = value[:, upper] - value[:, lower]
        order = np.argsort(-gain, axis=0, kind="stable")
        gained = np.zeros((len(gain) + 1, len(lower)))  # by the number of blocks at the upper level
        np.cumsum(np.take_along_axis(gain, order, axis=0), axis=0, out=gained[1:])
        gained[np.arange(len(gained))[:, None] > _most_upper(problem, stage, lower, upper)] = -np.inf
        total += value[:, lower].sum(axis=0) + gained.max(axis=0)
        ranked.append(order)
        counts.append(gained.argmax(axis=0))
    pair = int(total.argmax())
    levels = []
    for order, count in zip(ranked, counts, strict=True):
        level = np.full(len(order), lower[pair])
        level[order[: count[pair], pair]] = upper[pair]
        levels.append(level)
    return float(total[pair]), levels


def _most_upper(problem: PlanProblem, stage: LockstepStage, lower: Ints, upper: Ints) -> Ints:
    """For each pair, how many blocks at the upper level the stage's budgets pay for at most; -1: the budgets do not
    even pay for the lower level everywhere."""
    blocks = len(stage.blocks)
    most = np.full(len(lower), blocks)
    for limit in step_limits(problem, stage):
        rows = np.bincount(limit.group, minlength=len(limit.most)) / blocks  # of each group
        left: Floats = (limit.most * (1 + BUDGET_EPSILON / 10) / rows).min() - blocks * limit.use[lower]
        more = limit.use[upper] - limit.use[lower]
        paid = np.divide(left, more, out=np.full(len(lower), float(blocks)), where=more > 0)
        most = np.minimum(
            most, np.where(left < 0, -1, np.minimum(paid, blocks) + BUDGET_EPSILON / 10).astype(np.int64)
        )
    return most


def _have_the_same_levels(stages: list[LockstepStage]) -> bool:
    first = stages[0].levels
    return all(
        np.array_equal(stage.levels.forward_heads, first.forward_heads)
        and np.array_equal(stage.levels.backward_heads, first.backward_heads)
        for stage in stages
    )


class StaticOptions(WithShortcuts):
    """Options of the planner for fixed shapes."""

    heads_multiple: int = Field(default=1, gt=0)
    """A device runs a multiple of this number of heads in a block, or all of them. 2 is faster on a GPU, whose matrix
    products run in tiles of 128 columns (two heads of most models)."""


STATIC = Planner(
    "static",
    "fixed shapes: equally many heads of a block in all micro-batches, which torch.compile and CUDA graphs need",
    solve_static,
    StaticOptions,
    makes_few_shapes=True,
)
