"""The table of results on the project's first page, from the test runs in results.jsonl.

    python -m analysis.accuracy.summary       # prints the table, to be put between README's marks

A row for each data set, length and compute of the default plan, the worst difference from dense training first. Means
are over the seeds that both sides have; the rival trains in fewer steps for the same compute.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from statistics import mean
from typing import Any

from analysis.accuracy.table import LINES

NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "caltech101": "Caltech-101"}
HEAD = (
    "data set",
    "epochs",
    "seeds",
    "compute / dense",
    "accuracy",
    "dense",
    "difference",
    "rival: fewer steps",
)

Runs = dict[int, dict[str, Any]]
"""The run of each seed."""


def rows(lines: list[dict[str, Any]]) -> Iterator[tuple[float, list[str]]]:
    """The difference in points, and the cells of its row."""
    runs: dict[tuple[str, str, int, float], Runs] = defaultdict(dict)
    for line in lines:
        runs[line["config"], line["data"], line["epochs"], line["budget"]][line["seed"]] = line
    for (config, data, epochs, budget), of_seed in runs.items():
        if config not in ("tokens", "tokens_lora"):
            continue
        lora = config == "tokens_lora"
        dense = runs.get(("lora" if lora else "standard", data, epochs, 1.0), {})
        rival = {} if lora else runs.get(("fewer_steps", data, epochs, budget), {})
        seeds = sorted(of_seed.keys() & dense.keys())
        if not seeds:
            continue
        accuracy, of_dense = (
            100 * mean(each[seed]["accuracy"] for seed in seeds) for each in (of_seed, dense)
        )
        compute = mean(of_seed[seed]["tflop"] / dense[seed]["tflop"] for seed in seeds)
        yield (
            accuracy - of_dense,
            [
                NAMES[data] + (", LoRA" if lora else ""),
                str(epochs),
                str(len(seeds)),
                f"{compute:.2f}",
                f"{accuracy:.2f}",
                f"{of_dense:.2f}",
                f"{accuracy - of_dense:+.2f}",
                f"{100 * mean(line['accuracy'] for line in rival.values()):.2f}" if rival else "not run",
            ],
        )


def table() -> str:
    """As Markdown."""
    lines = [json.loads(text) for text in LINES.read_text().splitlines()]
    cells = [HEAD, ["---"] * len(HEAD), *(row for _, row in sorted(rows(lines)))]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


if __name__ == "__main__":
    print(table(), end="")
