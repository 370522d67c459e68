"""The table of results on the project's first page, from the test runs in results.jsonl.

    python -m analysis.accuracy.summary       # prints the table, to be put between README's marks

A row for each data set, length and compute of the default plan, which takes fewer steps over many epochs; the worst
difference from dense training first. Means are over the seeds that both sides have; the rival trains in fewer steps of
full images for the same compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import mean

from analysis.accuracy.table import Line, by_task, in_steps, read_lines
from d2ft_hpc.planning.tokens import best_steps_share

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


def rows(lines: Iterable[Line]) -> Iterator[tuple[float, list[str]]]:
    """The difference in points, and the cells of its row."""
    for lora, data, epochs, contenders, dense in by_task(lines):
        for (config, budget), of_seed in contenders.items():
            seeds = sorted(of_seed.keys() & dense.keys())
            rival = contenders.get(("fewer_steps", budget), {})
            default = in_steps("tokens_lora" if lora else "tokens", best_steps_share(budget, epochs))
            if not seeds or config != default or data not in NAMES:
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
    cells = [HEAD, ["---"] * len(HEAD), *(row for _, row in sorted(rows(read_lines())))]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


if __name__ == "__main__":
    print(table(), end="")
