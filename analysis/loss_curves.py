"""Draw training loss and accuracy of runs against measured training time (steps, scoring and planning)."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_hpc import results
from d2ft_hpc.errors import ResultsError

# Okabe and Ito's palette: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
LINES = ("-", "--", "-.", ":")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="results files or run folders")
    parser.add_argument("--smooth", type=int, default=20, help="steps in the moving average of the loss")
    parser.add_argument("--png", type=Path, help="write the picture here (default: loss_curves.png)")
    parser.add_argument(
        "--json", action="store_true", help="print the numbers as JSON; draws only with --png"
    )
    arguments = parser.parse_args()
    if arguments.smooth < 1:
        parser.error(f"--smooth {arguments.smooth}: give at least 1")
    try:
        curves = [read(path, arguments.smooth) for path in arguments.run]
    except ResultsError as fault:
        print(fault, file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(curves))
    if arguments.png or not arguments.json:
        draw(curves, arguments.png or Path("loss_curves.png"))
    return 0


def read(path: Path, smooth: int) -> dict[str, Any]:
    with results.open_run(path) as run:
        steps, evaluations = run.table("steps"), run.table("evaluations")
        known = np.isfinite(steps["loss"])
        loss, loss_seconds = steps["loss"][known], run.elapsed_seconds(steps["step"][known])
        window = max(1, min(smooth, len(loss)))
        if window > 1:
            loss = np.convolve(loss, np.full(window, 1 / window), mode="valid")
        judged = np.isfinite(evaluations["accuracy"])
        return {
            "run": str(path),
            "loss_seconds": loss_seconds[window - 1 :].tolist(),
            "loss": loss.tolist(),
            "accuracy_seconds": run.elapsed_seconds(evaluations["step"][judged]).tolist(),
            "accuracy": evaluations["accuracy"][judged].tolist(),
        }


def draw(curves: list[dict[str, Any]], png: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, curve in enumerate(curves):
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": LINES[i // len(COLOURS) % len(LINES)],
        }
        left.plot(curve["loss_seconds"], curve["loss"], label=curve["run"], **style)
        right.plot(curve["accuracy_seconds"], 100 * np.array(curve["accuracy"]), marker="o", **style)
    for axis, title, label in ((left, "Training loss", "loss"), (right, "Accuracy", "top-1 accuracy (%)")):
        axis.set(title=title, xlabel="training, scoring and planning time (s)", ylabel=label)
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(png, dpi=120)
    print(f"wrote {png}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
