"""The runs of `train`, and the tables of README.md from their results.

    python -m analysis.text.table search RESULTS      # a line of arguments for each contender at each rate
    python -m analysis.text.table finals RESULTS      # and for each at its best rate, with other seeds
    python -m analysis.text.table show [RESULTS]

Runs that RESULTS has are left out, and finals of a contender whose search it has not whole.

The best rate is that of the fewest bits a byte on the validation part. Differences are paired by seed: one seed is one
choice of training sequences and their order.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_hpc.figures.sufficient import lower_bound

LINES = Path(__file__).with_name("results.jsonl")
CONTENDERS = (  # those that take longest come first
    ("static", 0.6),
    ("dense", 1.0),
    *((name, budget) for budget in (0.6, 0.4) for name in ("samples", "fewer_steps", "small_batches")),
)
RATES = (3e-4, 8e-4, 2e-3)
SEARCH_SEED, SEEDS = 0, (1, 2, 3)

Line = dict[str, Any]
OfSeed = dict[int, Line]
Contenders = dict[tuple[str, float], OfSeed]


def read_lines(file: Path) -> list[Line]:
    return [json.loads(text) for text in file.read_text().splitlines()]


def missing(lines: list[Line], runs: Iterable[tuple[str, float, float, int]]) -> Iterator[str]:
    done = {tuple(line.get(key) for key in ("contender", "budget", "rate", "seed")) for line in lines}
    for contender, budget, rate, seed in runs:
        if (contender, budget, rate, seed) not in done:
            yield f"--contender {contender} --budget {budget:g} --rate {rate:g} --seed {seed}"


def best_rates(lines: list[Line]) -> dict[tuple[str, float], float]:
    found: dict[tuple[str, float], dict[float, float]] = defaultdict(dict)
    for line in lines:
        if line.get("seed") == SEARCH_SEED:
            found[line["contender"], line["budget"]][line["rate"]] = line["bits"]["validation"]
    return {
        contender: min(of_rate, key=lambda rate: of_rate[rate])
        for contender, of_rate in found.items()
        if of_rate.keys() >= {*RATES}
    }


def finals(lines: list[Line]) -> Contenders:
    best = best_rates(lines)
    found: Contenders = defaultdict(dict)
    for line in lines:
        contender = line["contender"], line.get("budget", 0.0)
        if line.get("seed") in SEEDS and line["rate"] == best.get(contender):
            found[contender][line["seed"]] = line
    return found


def difference(ours: OfSeed, theirs: OfSeed) -> str:
    """Cells: of bits a byte, with how much it is at most, and of accuracy, with how much it is at least."""
    seeds = sorted(ours.keys() & theirs.keys())
    bits = [ours[seed]["bits"]["test"] - theirs[seed]["bits"]["test"] for seed in seeds]
    points = [100 * (ours[seed]["accuracy"]["test"] - theirs[seed]["accuracy"]["test"]) for seed in seeds]
    most, least = -lower_bound([-each for each in bits]), lower_bound(points)
    return f"{np.mean(bits):+.4f} | {most:+.4f} | {np.mean(points):+.2f} | {least:+.2f}"


def mean(values: list[float], digits: int) -> str:
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def rows(lines: list[Line]) -> Iterator[str]:
    best, contenders = best_rates(lines), finals(lines)
    dense = contenders["dense", 1.0]
    in_order = sorted(contenders.items(), key=lambda item: (-item[0][1], item[0][0]))
    yield "| | budget | compute | rate | bits a byte | next byte (%) | seeds |\n|---|---|---|---|---|---|---|"
    for line in lines:
        if line["contender"] == "pretrained":
            accuracy = 100 * line["accuracy"]["test"]
            yield f"| before fine-tuning | | | | {line['bits']['test']:.4f} | {accuracy:.2f} | |"
    for (name, budget), of_seed in in_order:
        bits = mean([line["bits"]["test"] for line in of_seed.values()], 4)
        accuracies = mean([100 * line["accuracy"]["test"] for line in of_seed.values()], 2)
        seeds = of_seed.keys() & dense.keys()
        compute = np.mean([of_seed[seed]["flops"] / dense[seed]["flops"] for seed in seeds])
        yield (
            f"| `{name}` | {budget:g} | {compute:.3f} | {best[name, budget]:g} | {bits} | {accuracies} | "
            f"{len(of_seed)} |"
        )
    heads = "bits a byte, difference | at most (95 %) | points of accuracy, difference | at least (95 %)"
    yield f"\n| against dense | budget | {heads} |\n|---|---|---|---|---|---|"
    for (name, budget), of_seed in in_order:
        if of_seed is not dense:
            yield f"| `{name}` | {budget:g} | {difference(of_seed, dense)} |"
    yield f"\n| `samples` against | budget | {heads} |\n|---|---|---|---|---|---|"
    for (name, budget), of_seed in in_order:
        if name != "samples" and ("samples", budget) in contenders:
            yield f"| `{name}` | {budget:g} | {difference(contenders['samples', budget], of_seed)} |"


def main(command: str = "show", file: str = str(LINES)) -> None:
    lines = read_lines(Path(file))
    if command == "search":
        runs = ((*each, rate, SEARCH_SEED) for each in CONTENDERS for rate in RATES)
        texts = [*missing(lines, runs)]
    elif command == "finals":
        best = best_rates(lines)
        texts = [
            *missing(
                lines, ((*each, best[each], seed) for each in CONTENDERS if each in best for seed in SEEDS)
            )
        ]
    elif command == "show":
        texts = [*rows(lines)]
    else:
        sys.exit(__doc__)
    print("\n".join(texts))


if __name__ == "__main__":
    main(*sys.argv[1:])
