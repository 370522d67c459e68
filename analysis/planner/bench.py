"""How fast and how good the planners are on synthetic scores; needs no GPU and no MPI:

python -m analysis.planner.bench --blocks 12 --heads 6 --micro-batches 5 --ranks 1
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from d2ft_hpc.command import whole_number
from d2ft_hpc.errors import PlanError
from d2ft_hpc.launch import run_guarded
from d2ft_hpc.planning import PLANNERS, Budgets, Devices, GivenShares, PlanProblem, pose, solve
from d2ft_hpc.planning.bounds import upper_bound
from d2ft_hpc.planning.knapsack import device_knapsacks
from d2ft_hpc.planning.placement import in_order, place
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.problem import BUDGET_EPSILON
from d2ft_hpc.planning.simulate import simulate

COMPARED = {
    name: entry for name, entry in PLANNERS.items() if entry.binding == "slot" and entry.keeps_budgets
}
COMPUTE_BUDGET = 0.6
SPEEDS = (1.0, 0.5, 0.25, 1.0)
"""Of ranks in turn, in `--heterogeneous`."""


def waste(plan: SkipPlan, problem: PlanProblem) -> float:
    """Simulated step over the ideal one, minus 1; 0 if the plan is done before that.

    The ideal step spends the compute budgets, and devices wait in it only while a pipeline fills and drains.
    """
    slots = problem.slots
    cells = problem.cells_per_device
    budget = np.minimum(problem.compute_budget, cells * problem.compute_cost[Operation.FULL])
    ideal = float((budget / problem.device_speed).max()) * (slots + problem.stages - 1) / slots
    step = simulate(plan, problem).step
    excess = step / ideal - 1 if ideal > 0 else 0.0
    return excess if excess > BUDGET_EPSILON else 0.0


def benchmark(
    *,
    blocks: int,
    heads: int,
    micro_batches: int,
    ranks: int,
    stages: int = 1,
    heterogeneous: bool = False,
    equal_scores: bool = False,
    placed: bool = True,
    seed: int = 0,
    repeats: int = 3,
) -> dict[str, Any]:
    """Every planner on one problem: {planner: {seconds, gap, score, waste, ...}, "bound": ...}.

    seconds, cpu_seconds: the fastest of `repeats` times, on the clock and of the processor.
    placement_seconds: what the placement of the heads took, once for a run and in no planner's seconds.
    score and bound: shares of what the dense plan scores. bound (of each planner): what no plan of its kind exceeds.
    "bound": what no plan within the devices' budgets exceeds, from the linear relaxation of their knapsacks.
    waste: simulated step over the ideal one, minus 1. score_loss: against the best of them.

    Raises PlanError if heads or blocks cannot be divided evenly.
    """
    if blocks < 1 or stages < 1 or blocks % stages:
        raise PlanError(f"{blocks} blocks cannot be divided evenly over {stages} stages.")
    start = time.perf_counter()
    problem = synthetic_problem(
        (micro_batches, blocks, heads),
        ranks=ranks,
        stages=stages,
        heterogeneous=heterogeneous,
        equal_scores=equal_scores,
        placed=placed,
        seed=seed,
    )
    placement_seconds = time.perf_counter() - start if placed else 0.0
    dense = problem.objective(np.full(problem.forward_score.shape, 2, dtype=np.uint8))
    results: dict[str, Any] = {}
    notes: list[str] = []
    for planner, entry in COMPARED.items():
        options = {"seed": 0} if "seed" in entry.parameters else {}
        try:
            plans, cpu_seconds = [], []
            for _ in range(repeats):
                cpu_start = time.process_time()
                plans.append(solve(problem, planner, **options))
                cpu_seconds.append(time.process_time() - cpu_start)
        except PlanError as error:  # no plan of this kind keeps the budgets of very slow ranks
            notes.append(f"{planner}: {error}")
            continue
        seconds = [plan.solve_seconds for plan in plans]
        results[planner] = {
            "seconds": min(seconds),
            "median_seconds": float(np.median(seconds)),
            "cpu_seconds": min(cpu_seconds),
            "gap": plans[0].gap,
            "score": plans[0].objective / dense,
            "bound": plans[0].bound / dense,
            "waste": waste(plans[0], problem),
            "status": plans[0].status,
        }
    best = max((result["score"] for result in results.values()), default=1.0)
    for result in results.values():
        result["score_loss"] = 1 - result["score"] / best
    if notes:
        results["notes"] = notes
    results["placement_seconds"] = placement_seconds
    results["bound"] = sum(upper_bound(knapsack) for knapsack in device_knapsacks(problem)) / dense
    return results


def synthetic_problem(
    shape: tuple[int, int, int],
    *,
    ranks: int,
    stages: int = 1,
    heterogeneous: bool = False,
    equal_scores: bool = False,
    placed: bool = True,
    seed: int = 0,
) -> PlanProblem:
    """Log-normal scores of that [row, block, head] on `ranks` x `stages` devices, at 60 % of the compute.

    Heads differ much (standard deviation of the logarithm 1 forward, 0.5 backward, correlation 0.3), blocks less (0.5
    and 0.2), and a head's scores by 10 % from row to row. placed: heads are placed on the ranks by their scores.
    """
    _, blocks, heads = shape
    stage = np.arange(blocks) * stages // blocks
    speed = np.tile(np.resize(SPEEDS, ranks), stages) if heterogeneous else np.ones(ranks * stages)
    forward, backward = (np.ones(shape), np.ones(shape)) if equal_scores else _scores(shape, seed)

    def problem(rank: npt.NDArray[np.int64]) -> PlanProblem:
        devices = Devices(rank=rank, stage=stage, speed=speed.tolist())
        return pose([forward, backward], GivenShares(), Budgets(COMPUTE_BUDGET), devices)

    plain = problem(in_order(blocks, heads, ranks))
    return problem(place(plain, ranks)) if placed else plain


def _scores(shape: tuple[int, int, int], seed: int) -> Iterator[npt.NDArray[np.float64]]:
    _, blocks, heads = shape
    generator = np.random.default_rng(seed)
    common, own = generator.standard_normal((2, blocks, heads))
    for head, block_deviation in ((0.3 * common + np.sqrt(1 - 0.3**2) * own, 0.5), (0.5 * common, 0.2)):
        block = block_deviation * generator.standard_normal((blocks, 1))
        noise = np.clip(1 + 0.1 * generator.standard_normal(shape), 0.05, None)
        yield np.exp(head + block) * noise


def report(results: dict[str, Any], *, as_json: bool) -> str:
    """A table; with `as_json` its last line is the results as one JSON object."""
    lines = [
        f"{'planner':<16} {'ms':>9} {'CPU ms':>9} {'gap':>9} {'score':>8} {'loss':>8} {'waste':>8}  status"
    ]
    for name, result in results.items():
        if name in COMPARED:
            lines.append(
                f"{name:<16} {1e3 * result['seconds']:>9.1f} {1e3 * result['cpu_seconds']:>9.1f} "
                f"{result['gap']:>9.1e} {result['score']:>8.4f} {result['score_loss']:>8.2%} {result['waste']:>8.2%}  "
                f"{result['status']}"
            )
    lines.extend(results.get("notes", []))
    lines.append(f"heads were placed in {results['placement_seconds']:.2f} s, once for a run")
    lines.append(f"no plan within the budgets scores more than {results['bound']:.4f} of the dense one")
    if as_json:
        lines.append(json.dumps(results))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    for name in ("--blocks", "--heads", "--micro-batches"):
        parser.add_argument(name, type=whole_number(1), required=True)
    parser.add_argument("--ranks", type=whole_number(1), required=True, help="tensor-parallel ranks")
    parser.add_argument("--stages", type=whole_number(1), default=1, help="pipeline stages")
    parser.add_argument("--heterogeneous", action="store_true", help="ranks of different speeds")
    parser.add_argument("--equal-scores", action="store_true", help="no head is better than another")
    parser.add_argument(
        "--in-order", action="store_false", dest="placed", help="heads stay where timm has them"
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the scores")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    return run_guarded(None, lambda: print(report(benchmark(**options), as_json=as_json)))


if __name__ == "__main__":
    sys.exit(main())
