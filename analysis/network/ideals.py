"""The makespan plans' steps in results of `slow_links`, over ideals in which nothing overlaps:

    python -m analysis.network.ideals analysis/network/*bit*.json

Seconds of work and messages one after the other: of a plan that ran overlapped in the sharded layout, of the dense
model in the replicated one. `both ways`: a lone rank's sums leave after the tokens came. `one way`: only the busier
direction of the busiest link counts, as if a rank could send what it has not computed; results before the overlapped
layout were compared with that.
"""

import json
import sys
from typing import Any

import numpy as np
import torch

from analysis.engines.parallel import IMAGE_SIZE, TOKENS, Sizes, placed, posed
from analysis.network.slow_links import bits_per_second
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.metering import measure_costs
from d2ft_hpc.parallel.rank_layout import RankLayout
from d2ft_hpc.parallel.stages import layer_flops
from d2ft_hpc.planning import Budgets, Operation, SkipPlan, communication_volume, simulate, solve
from d2ft_hpc.planning.arrays import Floats
from d2ft_hpc.planning.step_time import StepTime

IMAGES = (3, IMAGE_SIZE, IMAGE_SIZE)
both_ways = communication_volume.busiest_shares


def one_way(layout: communication_volume.TokenLayout, ranks: int) -> Floats:
    shares = both_ways(layout, ranks)
    if layout == "replicated":
        return shares
    senders = np.maximum(np.arange(ranks + 1), 1)
    return np.asarray(shares * (ranks + senders - 2) / (2 * ranks - 2))


def show(path: str) -> None:
    with open(path) as file:
        result: dict[str, Any] = json.load(file)
    sizes = Sizes(**result["sizes"])
    stages, ranks = result["pipeline_stages"], result["tensor_parallel"]
    torch.manual_seed(0)
    model = sizes.model()
    costs = measure_costs(model, attach(model), IMAGES)
    shape = (sizes.micro_batches, sizes.blocks, sizes.heads)
    layout = RankLayout.of(stages * ranks, 0, stages=stages, tensor_ranks=ranks)
    placement = placed(sizes, layout, layer_flops(model, costs, IMAGES))
    token_layout: communication_volume.TokenLayout = (
        "replicated" if result["makespan"]["token_layout"] == "replicated" else "sharded"
    )
    problem = posed(
        sizes,
        placement,
        costs,
        Budgets(result["compute_budget"], result["communication_budget"]),
        messages=token_layout,
    )
    plan = solve(problem, "makespan")
    assert np.isclose(costs.planned_share(plan), result["makespan"]["planned_flops"])
    dense = SkipPlan(np.full(shape, Operation.FULL, np.uint8), 1)
    always = result["free_always_seconds"]
    step_time = StepTime(
        seconds_per_cost=(result["free_dense_seconds"] - always) / simulate(dense, problem).step,
        activation_bytes=4.0 * sizes.samples * TOKENS * sizes.heads * sizes.head_size,
        seconds_per_byte=8 / bits_per_second(result["rate"]),
        latency=0.0,
    )
    of_plan = result["makespan"]
    for name, shares in (("both ways", both_ways), ("one way", one_way)):
        communication_volume.busiest_shares = shares
        ideal = always + step_time.of(plan, problem, token_layout)
        of_dense = always + step_time.of(dense, problem, "replicated")
        print(
            f"{path.rsplit('/', 1)[-1]:32} {name:10} ideal {ideal:.2f} s, dense {of_dense:.2f} s; "
            f"step over ideal {of_plan['step_seconds'] / ideal:.3f}, "
            f"both in shares of dense {of_plan['step_ratio'] * of_dense / ideal:.3f}"
        )
    communication_volume.busiest_shares = both_ways


for given in sys.argv[1:]:
    show(given)
