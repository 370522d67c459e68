"""`d2ft-hpc plan`: plan from saved scores, or look at a saved plan, without a GPU and without MPI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from d2ft_hpc.errors import PlanError, ResultsError
from d2ft_hpc.planning import (
    Budgets,
    Devices,
    Operation,
    PlanProblem,
    SkipPlan,
    check,
    in_order,
    place,
    pose,
    simulate,
    solve,
)
from d2ft_hpc.safe_text import shortened


@dataclass(frozen=True, eq=False)
class SavedScores:
    """Scores float64 [row, block, head] of one results file, and what it knows of the costs.

    replicas: data-parallel replicas of the run. forward_share, always_share: as `CostShares` has them.
    """

    forward: npt.NDArray[np.float64]
    backward: npt.NDArray[np.float64]
    replicas: int
    forward_share: float
    always_share: float


def read_scores(path: Path, index: int = -1) -> SavedScores:
    """The scores of a run folder or results file. index: which of the run's; -1 = the last.

    Raises ResultsError if the file is none of ours or holds no such scores.
    """
    from d2ft_hpc import results

    with results.open(path) as run:
        found = len(run.table("scores", ["step"])["step"])
        if not found:
            raise ResultsError(
                f"{path} holds no scores: its planner read none. Run with another planner, such as joint."
            )
        if not -found <= index < found:
            raise ResultsError(f"{path} holds scores 0 to {found - 1}, asked for {index}.")
        forward, backward = (run.score(index, kind).astype(np.float64) for kind in ("forward", "backward"))
        model, environment = run.attributes("model"), run.attributes("environment")
    try:
        replicas = int(environment["replicas"] if "replicas" in environment else environment["world_size"])
        always, full, forward_only = (
            float(model[name]) for name in ("always_flops", "full_flops", "forward_only_flops")
        )
    except (LookupError, ValueError, OverflowError) as error:
        raise ResultsError(f"{path} does not say what its model costs ({error}): name another run.") from None
    costs = np.array([always, full, forward_only])
    if forward.shape != backward.shape or replicas < 1 or len(forward) % replicas:
        raise ResultsError(
            f"{path} is damaged: scores {forward.shape} and {backward.shape} of {replicas} replicas."
        )
    if not np.isfinite(costs).all() or costs.min() < 0 or full <= 0:
        raise ResultsError(
            f"{path} is damaged: its model costs {always:g}, {full:g} and {forward_only:g} FLOP."
        )
    if (frozen := str(model.get("frozen_blocks", "[]"))) != "[]":
        raise ResultsError(
            f"{path}: blocks {shortened(frozen)} were frozen in this run and always run FULL: d2ft-hpc train alone "
            f"plans for such a model (plan.planner, plan.compute_budget)"
        )
    return SavedScores(
        forward,
        backward,
        replicas=replicas,
        forward_share=forward_only / full,
        always_share=always / (always + forward[0].size * full),
    )


def problem_of(
    scores: SavedScores,
    budgets: Budgets,
    *,
    ranks: int = 1,
    stages: int = 1,
    speeds: Sequence[float] | None = None,
    placed: bool = False,
) -> PlanProblem:
    """The problem of the scores' run on another layout.

    speeds: of the tensor-parallel ranks of every stage; None = all equal. placed: heads are spread over the ranks by
    their scores (`place`).

    Raises PlanError if heads or blocks cannot be divided evenly, or a budget is out of range.
    """
    _, blocks, heads = scores.forward.shape
    if stages < 1 or blocks % stages:
        raise PlanError(f"{blocks} blocks cannot be divided evenly over {stages} stages.")
    if speeds is not None and len(speeds) != ranks:
        raise PlanError(f"There are {ranks} ranks but {len(speeds)} speeds: give one for each rank.")
    problem = pose(
        [scores.forward, scores.backward],
        scores,
        budgets,
        Devices(
            replicas=scores.replicas,
            rank=in_order(blocks, heads, ranks),
            stage=np.arange(blocks) * stages // blocks,
            speed=None if speeds is None else list(speeds) * (scores.replicas * stages),
        ),
    )
    return replace(problem, rank=place(problem, ranks)) if placed else problem


def describe_alone(plan: SkipPlan) -> str:
    """What the plan is, as far as it tells itself."""
    shares = ", ".join(f"{share:.1%} {operation.name}" for operation, share in plan.shares().items())
    grids = {grid for row in range(plan.num_rows) if (grid := plan.grid_of(row)) is not None}
    images = ", ".join(f"{down} x {across}" for down, across in sorted(grids))
    return (
        f"Plan {plan.hash[:12]} ({plan.evidence}): {plan.num_rows} rows x {plan.num_blocks} blocks "
        f"x {plan.num_heads} heads{images and f', images of {images} patches'}\n"
        f"{shares}; solved in {1e3 * plan.solve_seconds:.1f} ms"
    )


def describe(plan: SkipPlan, problem: PlanProblem) -> str:
    """Describes the plan, each device's work under it, and the time of its step."""
    return "\n".join([describe_alone(plan), "", *_device_table(plan, problem), "", *_times(plan, problem)])


def _device_table(plan: SkipPlan, problem: PlanProblem) -> list[str]:
    """Each device's shares of its dense step, and how long it waits for others."""
    timing = simulate(plan, problem)
    cells = problem.cells_per_device
    compute = problem.used_compute(plan) / (cells * problem.compute_cost[Operation.FULL])
    messages = problem.used_communication(plan) / np.maximum(problem.dense_communication(), 1e-300)
    memory = problem.used_memory(plan) / (cells / plan.slots)
    width = max(len(name) for name in problem.device_names)
    lines = [f"{'device':<{width}} {'compute':>8} {'messages':>9} {'memory':>7} {'waiting':>8}  (shares)"]
    for name, *used in zip(problem.device_names, compute, messages, memory, timing.idle, strict=True):
        lines.append("{:<{}} {:>8.1%} {:>9.1%} {:>7.1%} {:>8.1%}".format(name, width, *used))
    return lines


def _times(plan: SkipPlan, problem: PlanProblem) -> list[str]:
    """Predicted step time against the dense one, beside that of the paper's plan under the same budgets."""
    dense_plan = SkipPlan.dense(plan.slots, plan.replicas, plan.num_blocks, plan.num_heads)
    dense = simulate(dense_plan, problem).step

    def share(of: SkipPlan) -> float:
        return problem.always_share + (1 - problem.always_share) * simulate(of, problem).step / dense

    try:
        of_paper = f"of the paper's plan: {share(solve(problem, 'paper')):.1%}"
    except PlanError as error:
        of_paper = f"the paper's planner has no plan here: {error}"
    return [f"predicted step time: {share(plan):.1%} of the dense step (what always runs included)", of_paper]


def describe_difference(plan: SkipPlan, other: SkipPlan) -> str:
    """One line: how many entries change, by operation, and in how many rows the size of the images."""
    changes = plan.differs_from(other)
    parts = [f"{count} {before.name} -> {after.name}" for (before, after), count in changes.items()]
    told = f"{sum(changes.values())} of {plan.operations.size} entries change: " + ", ".join(parts)
    rows = sum(plan.grid_of(row) != other.grid_of(row) for row in range(plan.num_rows))
    sizes = f"images change their size in {rows} of {plan.num_rows} rows"
    return "; ".join([told] * bool(changes) + [sizes] * bool(rows)) or "the plans are the same"


def save_heat_map(plan: SkipPlan, path: Path) -> None:
    """A PNG: the share of rows in which each (block, head) runs forward, and in which it is FULL.

    Raises PlanError if the file cannot be written.
    """
    from d2ft_hpc.figures.style import new_figure

    figure = new_figure(10, 0.6 + 4.5 * max(0.4, min(1.6, plan.num_blocks / plan.num_heads)))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, operation, title in zip(
        axes, (Operation.FORWARD_ONLY, Operation.FULL), ("runs forward", "FULL"), strict=True
    ):
        share = (plan.operations >= operation).mean(axis=0)
        image = axis.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        axis.set(title=f"share of rows in which a head {'is ' * (title == 'FULL')}{title}", xlabel="head")
    axes[0].set_ylabel("block")
    figure.colorbar(image, ax=axes)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise PlanError(
            f"The picture cannot be written to {path}: {told}; choose another file (--png)"
        ) from error


def read_checked(path: Path, problem: PlanProblem) -> SkipPlan:
    """A saved plan; raises PlanError if it is damaged, or does not fit the problem's shape or budgets."""
    plan = SkipPlan.read(path)
    check(plan, problem)
    return plan
