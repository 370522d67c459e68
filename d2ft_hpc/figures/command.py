"""`d2ft-hpc figure NAME`: runs in; a picture, or its numbers as JSON, out."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from d2ft_hpc.paths import path_argument

FIGURES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "classes": ("accuracy by class and the confusion matrix", {}),
    "compare": ("configurations against each other over seeds, with the significance of the differences", {}),
    "gantt": (
        "what every rank did during some steps, phase after phase",
        {
            "--first": {"type": int, "help": "first step to show (default: the middle of the run)"},
            "--steps": {"type": int, "default": 4, "help": "how many steps (default: 4)"},
        },
    ),
    "learning": (
        "training loss and accuracy against measured training time (steps, scoring and planning)",
        {"--smooth": {"type": int, "default": 20, "help": "most steps in the moving average of the loss"}},
    ),
    "paper": ("the claims of the paper (arXiv 2504.12471) beside what runs measured", {}),
    "pareto": (
        "accuracy of many runs against measured time, compute and bytes, dense runs and dense at equal compute "
        "among them",
        {},
    ),
    "plans": (
        "what plans do: block x head for each operation, over time, and by micro-batch",
        {"--plan": {"type": int, "help": "index of the plan to show (default: all)"}},
    ),
    "predicted": ("what plans promised against what was measured: compute and time", {}),
    "scores": (
        "contribution scores over the blocks and heads of the model",
        {
            "--index": {
                "type": int,
                "default": -1,
                "help": "which measurement of the run (default: the last)",
            }
        },
    ),
    "summary": ("compute and time of runs, planned and measured", {}),
    "workload": (
        "how evenly the work is spread: compute and its variance over ranks, and each rank's time by phase",
        {},
    ),
}
"""What each shows, and its own arguments, which become keywords of `measure` in the module of that name."""


def add_figures(figures: Any) -> None:
    """figures: the subparsers to add to."""
    for name, (shows, arguments) in FIGURES.items():
        parser = figures.add_parser(name, help=shows, description=f"{shows[0].upper()}{shows[1:]}.")
        parser.add_argument(
            "runs", type=path_argument, nargs="+", metavar="RUN", help="run folders or results files"
        )
        for flag, settings in arguments.items():
            parser.add_argument(flag, **settings)
        parser.add_argument(
            "--output",
            type=path_argument,
            help=f"picture to write: .png, .pdf or .svg (default: {name}.png)",
        )
        parser.add_argument("--json", action="store_true", help="print the numbers; draws only with --output")
        parser.set_defaults(run=_figure, figure=name)


def _figure(options: argparse.Namespace) -> None:
    from d2ft_hpc.figures.run import open_runs
    from d2ft_hpc.figures.style import save

    figure = import_module(f"d2ft_hpc.figures.{options.figure}")
    names = [flag.removeprefix("--") for flag in FIGURES[options.figure][1]]
    with open_runs(options.runs) as runs:
        numbers = figure.measure(runs, **{name: getattr(options, name) for name in names})
    if options.json:
        print(json.dumps(plain(numbers)))
    if options.output or not options.json:
        output = options.output or Path(f"{options.figure}.png")
        save(figure.draw(numbers), output)
        print(f"wrote {output}", file=sys.stderr)


def plain(value: Any) -> Any:
    """Numbers for JSON: arrays as lists, NaN and infinity as null."""
    import numpy as np

    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
