"""The paper's table from runs on CIFAR-10: `table.py add RUN...` appends a line a run to results.jsonl, `table.py`
prints the tables of README.md from it and draws pareto.png. Differences are paired by seed."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from d2ft_hpc.figures.run import Run

LINES = Path(__file__).with_name("results.jsonl")
SUBJECTS = ("samples", "samples_lora")
DENSE = ("standard", "lora")
PARTS = {1.0: "all", 0.1: "tenth"}

Line = dict[str, Any]
Key = tuple[Any, ...]


def line_of(folder: Path) -> Line:
    """What is kept of a run. Its folder is named CONFIG-sSEED, as configs/paper does; `variant` is for what was set by
    hand. `tflop`: executed, scoring included."""
    run, name = (
        Run(folder / "results.h5", folder.name),
        folder.name.rpartition("-s")[0].removeprefix("tenth-"),
    )
    try:
        config = run.config
        data, plan = config["data"], config["plan"]
        scored = run.results.table("scores", ["flops"])["flops"]
        return {
            "data": PARTS[data["train_fraction"]],
            "epochs": config["train"]["epochs"],
            "budget": 1.0 if name in DENSE else plan["compute_budget"],
            "config": name,
            "variant": "",
            "seed": config["run"]["seed"],
            "evaluated_on": "validation" if data["validation_fraction"] else "test",
            "steps": len(run.steps["step"]),
            "tflop": round(run.total_flops / 1e12, 1),
            "planned_compute": round(run.planned_compute, 4),
            "executed_compute": round(run.measured_compute, 4),
            "scoring_tflop": round(float(np.nansum(scored)) / 1e12, 1),
            "accuracy": round(run.accuracy, 4),
        }
    finally:
        run.close()


def add(folders: Iterable[Path]) -> None:
    """Appends a line for each run folder to results.jsonl."""
    with LINES.open("a") as file:
        for folder in folders:
            file.write(json.dumps(line_of(folder)) + "\n")


def read() -> list[Line]:
    """The lines of runs on test images, each with its compute: a share of the dense run's on the same images.

    LoRA runs count in shares of dense LoRA.
    """
    lines = [json.loads(text) for text in LINES.read_text().splitlines()]
    lines = [line for line in lines if line["evaluated_on"] == "test"]
    whole = {(*task(line), line["config"]): line["tflop"] for line in lines if line["budget"] == 1}
    for line in lines:
        dense = (*task(line), "lora" if "lora" in line["config"] else "standard")
        line["compute"] = line["tflop"] / whole[dense] if dense in whole else line["budget"]
    return lines


def task(line: Line) -> Key:
    return line["data"], line["epochs"]


def groups(lines: Iterable[Line]) -> dict[Key, dict[str, dict[int, Line]]]:
    """By (data, epochs, budget, LoRA or not), configuration and seed; dense runs stand in every budget's group."""
    found: dict[Key, dict[str, dict[int, Line]]] = defaultdict(lambda: defaultdict(dict))
    dense = [line for line in lines if line["budget"] == 1]
    for line in lines:
        if line["budget"] < 1:
            key = (*task(line), line["budget"], "lora" in line["config"])
            found[key][name_of(line)][line["seed"]] = line
    for data, epochs, budget, is_lora in list(found):
        for line in dense:
            if task(line) == (data, epochs) and ("lora" in line["config"]) == is_lora:
                found[data, epochs, budget, is_lora][name_of(line)][line["seed"]] = line
    return found


def name_of(line: Line) -> str:
    return f"{line['config']} {line['variant']}".strip().replace("_", " ")


def paired(ours: dict[int, Line], theirs: dict[int, Line]) -> tuple[float, float, float, int]:
    """Mean difference in points over the common seeds, its 95 % t-interval, and their number."""
    seeds = sorted(ours.keys() & theirs.keys())
    differences = np.array([100 * (ours[seed]["accuracy"] - theirs[seed]["accuracy"]) for seed in seeds])
    if len(seeds) < 2:
        return (
            (float(differences.mean()) if len(seeds) else float("nan")),
            float("nan"),
            float("nan"),
            len(seeds),
        )
    half = float(stats.t.ppf(0.975, len(seeds) - 1) * differences.std(ddof=1) / len(seeds) ** 0.5)
    mean = float(differences.mean())
    return mean, mean - half, mean + half, len(seeds)


def print_tables(found: dict[Key, dict[str, dict[int, Line]]]) -> None:
    for (data, epochs, budget, is_lora), configs in sorted(found.items()):
        ours = configs.get(SUBJECTS[is_lora], {})
        print(f"\n**{data}, {epochs} epochs, budget {budget:g}{', LoRA' if is_lora else ''}**\n")
        print("| | compute | accuracy | seeds | samples - this one | pairs |\n|---|---|---|---|---|---|")
        means = {name: np.mean([line["accuracy"] for line in of.values()]) for name, of in configs.items()}
        for name in sorted(configs, key=lambda name: -means[name]):
            accuracies = [100 * line["accuracy"] for line in configs[name].values()]
            compute = np.mean([line["compute"] for line in configs[name].values()])
            spread = f" ± {np.std(accuracies, ddof=1):.2f}" if len(accuracies) > 1 else ""
            mean, low, high, pairs = paired(ours, configs[name])
            interval = f" [{low:+.2f}, {high:+.2f}]" if pairs > 1 else ""
            difference = "" if name.replace(" ", "_") in SUBJECTS or not pairs else f"{mean:+.2f}{interval}"
            print(
                f"| {name} | {compute:.3f} | {np.mean(accuracies):.2f}{spread} | {len(accuracies)} | {difference} | "
                f"{pairs if difference else ''} |"
            )


def draw_pareto(lines: list[Line], path: Path) -> None:
    """Mean accuracy and its standard error against compute, a panel for each task."""
    from matplotlib.figure import Figure

    names = ("samples", "standard", "fewer samples", "small batches")
    tasks = (("all", 1), ("all", 3), ("tenth", 5), ("tenth", 10))
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axis, its_task in zip(figure.subplots(1, len(tasks)), tasks, strict=True):
        for name, marker, colour in zip(names, "o*sv", ("C0", "black", "C1", "C2"), strict=True):
            points: dict[float, list[Line]] = defaultdict(list)
            for line in lines:
                if task(line) == its_task and name_of(line) == name:
                    points[line["budget"]].append(line)
            if not points:
                continue
            its = [points[budget] for budget in sorted(points)]
            x = [np.mean([line["compute"] for line in of]) for of in its]
            y = [100 * np.mean([line["accuracy"] for line in of]) for of in its]
            error = [
                100 * np.std([line["accuracy"] for line in of], ddof=1) / len(of) ** 0.5 if len(of) > 1 else 0
                for of in its
            ]
            axis.errorbar(x, y, error, marker=marker, color=colour, label=name, markersize=9, capsize=3)
        data, epochs = its_task
        images = "all images" if data == "all" else "a tenth of the images"
        axis.set(title=f"{images}, {epochs} epoch{'s' * (epochs > 1)}", xlabel="compute, of dense")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("top-1 (%)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=110)


def main() -> int:
    if sys.argv[1:2] == ["add"]:
        add(map(Path, sys.argv[2:]))
        return 0
    lines = read()
    print_tables(groups(lines))
    draw_pareto(lines, LINES.with_name("pareto.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
