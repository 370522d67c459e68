"""Draw how often a run's plans have each head of each block FULL, FORWARD_ONLY and SHORTCUT."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from d2ft_hpc import results
from d2ft_hpc.errors import ResultsError

OPERATIONS = ("SHORTCUT", "FORWARD_ONLY", "FULL")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="results file or run folder")
    parser.add_argument(
        "--plan", type=int, help="index of the plan to draw (default: the mean over all plans)"
    )
    parser.add_argument("--png", type=Path, help="write the picture here (default: plan_heatmap.png)")
    parser.add_argument(
        "--json", action="store_true", help="print the numbers as JSON; draws only with --png"
    )
    arguments = parser.parse_args()
    try:
        with results.open_run(arguments.run) as run:
            plans = {attributes["index"]: data["operations"] for data, attributes in run.groups("plans")}
    except ResultsError as fault:
        print(fault, file=sys.stderr)
        return 1
    if arguments.plan is not None:
        plans = {index: plan for index, plan in plans.items() if index == arguments.plan}
    if not plans:
        print(
            f"{arguments.run} has no plan {'' if arguments.plan is None else arguments.plan}", file=sys.stderr
        )
        return 1

    shares = {
        name: np.mean([(np.asarray(plan) == code).mean(axis=0) for plan in plans.values()], axis=0)
        for code, name in enumerate(OPERATIONS)
    }
    if arguments.json:
        print(
            json.dumps(
                {"plans": list(plans), "share": {name: share.tolist() for name, share in shares.items()}}
            )
        )
    if arguments.png or not arguments.json:
        draw(shares, arguments.png or Path("plan_heatmap.png"))
    return 0


def draw(shares: dict[str, np.ndarray], png: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, name in zip(axes, reversed(OPERATIONS), strict=True):
        image = axis.imshow(
            100 * shares[name], vmin=0, vmax=100, cmap="cividis", aspect="auto", origin="lower"
        )
        axis.set(title=f"{name}: {shares[name].mean():.1%} of the plan", xlabel="head")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("block")
    figure.colorbar(image, ax=axes, label="share of rows (%)")
    figure.savefig(png, dpi=120)
    print(f"wrote {png}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
