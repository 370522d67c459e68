"""DeepSpeed's step time with an all-FULL plan over that of the same engine without us, in turns:

    mpirun -n 2 python -m analysis.engines.overhead --stage 2

What is left is where an engine's tensors happen to lie in memory: overhead is therefore measured on two engines of
either kind, and the ratio of the two without us to each other says what the bench can tell.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from analysis.engines.bare import bare_engine, frozen_below
from d2ft_hpc.bench.commands import add_workload, read_workload
from d2ft_hpc.bench.turns import WARM_UP, Ratio, alternate
from d2ft_hpc.bench.workload import (
    Built,
    Workload,
    batch_of,
    build,
    described,
    loss_of,
    make_optimizer,
    model_of,
    posed,
    title,
)
from d2ft_hpc.engines.deepspeed import deepspeed_config
from d2ft_hpc.launch import Control, connect, detect, run_guarded, share
from d2ft_hpc.metering import meter
from d2ft_hpc.planning import SkipPlan, solve


def overhead(workload: Workload, control: Control) -> dict[str, Any]:
    """The step time with us and an all-FULL plan over that of the same DeepSpeed engine without us, beside how many
    operators and bytes of messages the steps have, in which no machine's noise is.

    Raises ConfigError if the ranks do not form whole replicas.
    """
    built = build(workload, control)
    engine, layout = built.engine, built.placement.layout
    dense = SkipPlan.dense(workload.slots, layout.replicas, *built.shape)
    batch = batch_of(workload, layout.replica)

    def with_us(built: Built) -> Callable[[], object]:
        built.engine.executor.activate(dense, layout.replica)
        return lambda: built.engine.step(batch)

    def without() -> Callable[[], object]:
        model = frozen_below(model_of(workload))
        config = deepspeed_config(
            workload.config.engine.deepspeed,
            micro_batch_size=workload.micro_batch_size,
            slots=workload.slots,
            precision=workload.precision,
            gradient_clipping=None,
        )
        step = bare_engine(model, built.placement, config, make_optimizer, loss_of)
        return lambda: step(batch)

    # Made in an order and, as `alternate` does, run in orders that favour neither.
    steps = {"ours": with_us(built), "bare": without(), "other bare": without()}
    steps["other ours"] = with_us(build(workload, control))
    seconds = alternate(steps, workload.steps, workload.device, control)
    lookups = engine.executor.lookup_seconds / (workload.steps + WARM_UP)
    counted = {}
    for name in ("ours", "bare"):
        with meter() as metered:
            steps[name]()
        counted[name] = {"operators": metered.operators, "bytes_sent": metered.bytes_sent}
    start = time.perf_counter()
    plan = share(control, lambda: solve(posed(built, workload, 0.6), "joint").to_bytes(), "the plan")
    engine.executor.activate(SkipPlan.from_bytes(plan), layout.replica)
    planning = time.perf_counter() - start
    bare = seconds["bare"] + seconds["other bare"]
    return {
        **described(workload, control),
        "bare_seconds": float(np.median(bare)) / 2,
        "ours_over_bare": asdict(Ratio.of(seconds["ours"] + seconds["other ours"], bare)),
        "bare_over_bare": asdict(Ratio.of(seconds["other bare"], seconds["bare"])),
        "counted": counted,
        "lookup_seconds_a_step": lookups,
        "planning_seconds_a_plan": planning,
        "seconds": {name: of_name.tolist() for name, of_name in seconds.items()},
    }


def overhead_report(result: Mapping[str, Any]) -> str:
    ours, bare = result["counted"]["ours"], result["counted"]["bare"]
    return "\n".join(
        [
            title(result),
            f"step without us          {1e3 * result['bare_seconds']:9.2f} ms",
            f"step with an all-FULL plan over that   {Ratio(**result['ours_over_bare'])}",
            f"another engine without us over that    {Ratio(**result['bare_over_bare'])}",
            f"operators of a step      {ours['operators']:9d} with us, {bare['operators']} without",
            f"bytes sent in a step     {sum(ours['bytes_sent'].values()):9d} with us, "
            f"{sum(bare['bytes_sent'].values())} without",
            f"looking the plan up      {1e6 * result['lookup_seconds_a_step']:9.0f} us a step",
            f"planning                 {1e6 * result['planning_seconds_a_plan']:9.0f} us a plan (joint, solved, sent, "
            f"loaded)",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="overhead", description=__doc__)
    add_workload(parser)
    options = parser.parse_args()
    control = connect(detect(), device_type=options.device)

    def run() -> None:
        result = overhead(read_workload(options), control)
        if control.rank == 0:
            print(overhead_report(result))
            if options.json:
                print(json.dumps(result))

    return run_guarded(control, run)


if __name__ == "__main__":
    sys.exit(run_guarded(None, main))
