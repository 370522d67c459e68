"""The command line that all scripts of `analysis/` share: runs in; a picture, or JSON, out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from d2ft_hpc.errors import D2ftError
from d2ft_hpc.figures.run import Runs
from d2ft_hpc.figures.style import save
from d2ft_hpc.paths import path_argument


class FigureModule(Protocol):
    """What a figure's module offers."""

    measure: Callable[..., dict[str, Any]]
    draw: Callable[[dict[str, Any]], Any]


def show(
    figure: FigureModule,
    description: str | None,
    default_output: str,
    options: Sequence[tuple[str, dict[str, Any]]] = (),
) -> int:
    """Runs the script `description` and returns its exit status.

    options: further arguments of the script, as for `add_argument`, which become keywords of `figure.measure`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "runs", type=path_argument, nargs="+", metavar="RUN", help="run folders or results files"
    )
    for name, settings in options:
        parser.add_argument(name, **settings)
    parser.add_argument(
        "--output",
        type=path_argument,
        help=f"picture to write: .png, .pdf or .svg (default: {default_output})",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers; draws only with --output")
    arguments = vars(parser.parse_args())
    paths, output, as_json = arguments.pop("runs"), arguments.pop("output"), arguments.pop("json")
    try:
        with Runs(paths) as runs:
            numbers = figure.measure(runs, **arguments)
        if as_json:
            print(json.dumps(plain(numbers)))
        if output or not as_json:
            save(figure.draw(numbers), output or Path(default_output))
            print(f"wrote {output or default_output}", file=sys.stderr)
    except D2ftError as fault:
        print(fault, file=sys.stderr)
        return 1
    return 0


def plain(value: Any) -> Any:
    """Numbers for JSON: arrays as lists, NaN and infinity as null."""
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
