"""What saving checkpoints costs the training beside it; start it as the run:

mpirun -n 2 python -m analysis.cluster.checkpoints configs/demo.yaml
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2ft_hpc.bench.turns import Ratio
from d2ft_hpc.command import add_config, config_of, on_ranks, whole_number
from d2ft_hpc.config import RunConfig
from d2ft_hpc.engines.build import build_engine
from d2ft_hpc.launch import Control, agreed, run_guarded
from d2ft_hpc.launch.watch import Watch
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.training.checkpoint import Position
from d2ft_hpc.training.job import set_up
from d2ft_hpc.training.model_placement import place
from d2ft_hpc.training.saver import CheckpointSaver


def benchmark(
    config: RunConfig, control: Control, device: torch.device, watch: Watch, *, steps: int, pairs: int
) -> dict[str, Any]:
    """Stretches of `steps` dense steps, half of which begin with a save, in turns; on all ranks together.

    A stretch ends when the last step is done and the checkpoint is on disk, so that all that saving takes counts:
    copying, writing beside the steps, and waiting for what the stretch was too short for. Rank 0's clock.
    Checkpoints go below run.folder, where those of a run would, and are removed. The first pair warms up.
    """
    with agreed(control, "set-up"):
        job = set_up(config, control, device)
    placement = place(job, None, watch)
    engine = build_engine(job.config, job.model, job.executor, placement, 10**6, job.loss, control)
    plan = SkipPlan.dense(config.data.slots, job.layout.replicas, *job.executor.subnets.shape)
    engine.executor.activate(plan, job.layout.replica)
    job.sampler.set_epoch(0)
    batch = next(job.batches(job.train_batches))
    folder = Path(config.run.folder) / "bench-checkpoints"
    seconds: dict[bool, list[float]] = {True: [], False: []}
    waits, sizes = [], []
    try:
        with CheckpointSaver(folder, control) as saver:
            for turn in range(2 * pairs + 2):
                saves = turn % 4 in (0, 3)  # the order changes from pair to pair
                _arrive(control, device)
                start = time.perf_counter()
                if saves:
                    saved = saver.save(engine, plan, Position(steps_done=turn), lambda: None)
                    waits.append(time.perf_counter() - start)
                for _ in watch.along(range(steps)):
                    engine.step(batch)
                saver.finish()
                _arrive(control, device)
                seconds[saves].append(time.perf_counter() - start)
                if saves and control.rank == 0:
                    sizes.append(sum(path.stat().st_size for path in saved.rglob("*") if path.is_file()))
    finally:
        if control.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    with_saves, without = (np.array(seconds[saves][1:]) for saves in (True, False))
    ratio, interval = Ratio.of(with_saves, without), config.train.checkpoint_interval
    stretch = float(np.median(without))
    return {
        "model": config.model.name,
        "engine": config.engine.name,
        "ranks": control.world_size,
        "device": device.type,
        "steps": steps,
        "pairs": pairs,
        "checkpoint_bytes": sizes[-1] if sizes else 0,
        "step_seconds": stretch / steps,
        "wait_seconds": float(np.median(waits[1:])),
        "save_seconds": [stretch * (value - 1) for value in (ratio.median, ratio.low, ratio.high)],
        "minutes_between": interval.number if interval is not None and interval.unit == "minute" else None,
        "seconds_with_save": with_saves.tolist(),
        "seconds_without": without.tolist(),
    }


def report_text(measured: dict[str, Any], as_json: bool) -> str:
    """The measurements as JSON or for a terminal."""
    if as_json:
        return json.dumps(measured)
    m = measured
    cost, low, high = m["save_seconds"]
    lines = [
        f"{m['model']}, {m['engine']}, {m['ranks']} ranks, {m['device']}: {m['pairs']} pairs of {m['steps']} steps of "
        f"{1e3 * m['step_seconds']:.1f} ms, checkpoints of {m['checkpoint_bytes'] / 1e6:.1f} MB",
        f"a save holds the training up {m['wait_seconds']:.3f} s and costs it {cost:.3f} s in all "
        f"(95 %: {low:.3f} to {high:.3f})",
        f"that is 1 % of the time with a save every {100 * max(cost, 0):.0f} s (at most {100 * max(high, 0):.0f})",
    ]
    if m["minutes_between"]:
        share = cost / (60 * m["minutes_between"])
        lines.append(f"and {share:.3%} with one every {m['minutes_between']:g} min, as configured")
    return "\n".join(lines)


def _arrive(control: Control, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    control.barrier(600)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="checkpoints", description="Trains in stretches with and without a save, in turns."
    )
    add_config(parser)
    parser.add_argument("--steps", type=whole_number(1), default=50, help="of a stretch (default: 50)")
    parser.add_argument(
        "--pairs", type=whole_number(1), default=10, help="stretches with and without (default: 10)"
    )
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON")
    options = parser.parse_args()

    def run() -> int:
        def bench(control: Control, device: torch.device, launcher: str, watch: Watch) -> int:
            measured = benchmark(config, control, device, watch, steps=options.steps, pairs=options.pairs)
            if control.rank == 0:
                print(report_text(measured, options.json))
            return 0

        config = config_of(options)
        return on_ranks(config, bench)

    return run_guarded(None, run)


if __name__ == "__main__":
    sys.exit(main())
