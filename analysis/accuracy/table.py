"""Test accuracy of whole runs on three data sets.

    python -m analysis.accuracy.table add RUN...      # appends a line for each finished run to results.jsonl
    python -m analysis.accuracy.table                 # prints the tables of README.md from it

Differences are paired by seed: one seed is one initial classifier, order of images and augmentation. A seed that was
run again counts once, with the mean accuracy of its runs.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_hpc.figures.run import Run
from d2ft_hpc.figures.sufficient import lower_bound

LINES = Path(__file__).with_name("results.jsonl")
OLDER = ", cut at 224 px"

Line = dict[str, Any]
OfSeed = dict[int, Line]
"""The run of each seed."""
Contenders = dict[tuple[str, float], OfSeed]
"""By configuration and share of the dense compute."""


def line_of(folder: Path) -> Line | None:
    """What is kept of a run, named CONFIG_DATA_...; None if it is not finished. `tflop` is what was executed, `cut` the
    size that photographs are cut in, that of their step; older lines lack it, whose photographs were cut at 224 px and
    by other random numbers."""
    run = Run(folder / "results.h5", folder.name)
    try:
        if not run.complete:
            return None
        config = run.config
        name = folder.name.partition(f"_{Path(config['data']['root']).stem}_")[0]
        of_step = 1.0 if config["plan"]["planner"] == "dense" else config["plan"]["compute_budget"]
        of_steps = run.asked_steps_share
        is_of_all = config["train"]["steps_share"] == "auto"  # and so is compute_budget then
        return {
            "config": name if of_step == 1.0 else in_steps(name, of_steps),
            "data": Path(config["data"]["root"]).stem,
            "cut": "step",
            "epochs": config["train"]["epochs"],
            "budget": round(of_step if is_of_all else of_step * of_steps, 4),
            "seed": config["run"]["seed"],
            "steps": len(run.steps["step"]),
            "tflop": round(run.total_flops / 1e12, 1),
            "accuracy": round(run.accuracy, 4),
        }
    finally:
        run.close()


def in_steps(name: str, share: float) -> str:
    """The name of a contender that takes this share of its epochs' steps."""
    return name if share == 1 else f"{name}, {share:g} of the steps"


def add(folders: Iterable[Path]) -> None:
    with LINES.open("a") as file:
        for folder in folders:
            line = line_of(folder)
            if line is not None:
                file.write(json.dumps(line) + "\n")


def read_lines() -> list[Line]:
    return [json.loads(text) for text in LINES.read_text().splitlines()]


def by_task(lines: Iterable[Line]) -> Iterator[tuple[bool, str, int, Contenders, OfSeed]]:
    """LoRA or not, data set, epochs, all contenders, and the dense one among them. Older runs on photographs are a data
    set of their own."""
    tasks: dict[tuple[bool, str, int], Contenders] = defaultdict(lambda: defaultdict(dict))
    for line in _of_seeds(lines):
        lora = "lora" in line["config"]
        is_older = line["data"] == "caltech101" and "cut" not in line
        data = line["data"] + (OLDER if is_older else "")
        tasks[lora, data, line["epochs"]][line["config"], line["budget"]][line["seed"]] = line
    for (lora, data, epochs), contenders in sorted(tasks.items()):
        yield lora, data, epochs, contenders, contenders.get(("lora" if lora else "standard", 1.0), {})


def _of_seeds(lines: Iterable[Line]) -> Iterator[Line]:
    """One line for each seed of a contender, with the mean accuracy of its runs."""
    runs: dict[tuple[object, ...], list[Line]] = defaultdict(list)
    for line in lines:
        runs[tuple(line.get(key) for key in ("config", "data", "cut", "epochs", "budget", "seed"))].append(
            line
        )
    for again in runs.values():
        yield again[0] | {"accuracy": float(np.mean([line["accuracy"] for line in again]))}


def print_tables(lines: list[Line]) -> None:
    for lora, data, epochs, contenders, dense in by_task(lines):
        print(f"\n**{data}, {epochs} epochs{', LoRA' if lora else ''}**\n")
        print("| | compute | top-1 (%) | seeds | difference from dense | one-sided 95 % bound |")
        print("|---|---|---|---|---|---|")
        for (config, _), of_seed in sorted(contenders.items(), key=lambda item: (-item[0][1], item[0][0])):
            seeds = sorted(of_seed.keys() & dense.keys())
            top1 = 100 * np.array([line["accuracy"] for line in of_seed.values()])
            compute = np.mean([of_seed[seed]["tflop"] / dense[seed]["tflop"] for seed in seeds])
            spread = f" ± {top1.std(ddof=1):.2f}" if len(top1) > 1 else ""
            row = f"| `{config}` | {compute:.3f} | {top1.mean():.2f}{spread} | {len(top1)} |"
            if of_seed is dense:
                print(f"{row} | |")
                continue
            gained = [100 * (of_seed[seed]["accuracy"] - dense[seed]["accuracy"]) for seed in seeds]
            bound = f"{lower_bound(gained):+.2f}" if len(gained) > 1 else ""
            print(f"{row} {np.mean(gained):+.2f} | {bound} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        add(map(Path, sys.argv[2:]))
    else:
        print_tables(read_lines())
