"""How all figures look. Colours are Okabe and Ito's, told apart with every kind of colour vision."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d2ft_hpc.errors import ResultsError
from d2ft_hpc.results.schema import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:  # matplotlib is slow to import, and not needed for numbers
    Axes = Figure = Any

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HEAT = "cividis"
PHASE_STYLES: dict[str, dict[str, Any]] = {
    "data": {"facecolor": "#56B4E9"},
    "forward": {"facecolor": "#0072B2"},
    "backward": {"facecolor": "#E69F00"},
    "communication": {"facecolor": "#CC79A7"},
    "waiting": {"facecolor": "white", "edgecolor": "#CC79A7", "hatch": "//////"},
    "optimizer": {"facecolor": "#009E73"},
    "other": {"facecolor": "#BBBBBB"},
}


def new_figure(width: float, height: float) -> Figure:
    """A figure of that size, inches. Without pyplot no display is ever opened."""
    from matplotlib.figure import Figure  # slow to import

    return Figure(figsize=(width, height), layout="constrained")


def line_style(index: int) -> dict[str, Any]:
    """Colour and line of the n-th run."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
    }


def marker_style(index: int) -> dict[str, Any]:
    """Colour and marker of the n-th run: filled, and hollow once the colours are used up."""
    colour = COLOURS[index % len(COLOURS)]
    hollow = index // len(COLOURS) % 2 == 1
    return {
        "color": colour,
        "marker": MARKERS[index % len(MARKERS)],
        "markerfacecolor": "white" if hollow else colour,
        "markeredgecolor": colour if hollow else "black",
        "markeredgewidth": 2 if hollow else 1,
    }


def short(name: str, length: int = 28) -> str:
    """The name, its middle left out if it is long."""
    return name if len(name) <= length else f"{name[: length // 2 - 2]}...{name[-length // 2 + 1 :]}"


def number(value: float | None, form: str) -> str:
    """A number as text; "-" for what was not recorded."""
    return "-" if value is None or not np.isfinite(value) else format(value, form)


def say(axis: Axes, text: str) -> None:
    """Write in the middle of an empty plot why it is empty."""
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color="0.4", wrap=True)


def legend_below(figure: Figure) -> None:
    """One legend for the whole figure, below it, in which each label stands once."""
    drawn: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            drawn.setdefault(label, handle)
    if drawn:
        handles, labels, columns = list(drawn.values()), list(drawn), min(len(drawn), 7)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")


def boxes(axis: Axes, left: Array, right: Array, bottom: Array, top: Array, **style: Any) -> None:
    """Rectangles of one style, all arrays [box]. They are one artist, since an artist for each would take seconds to
    draw."""
    from matplotlib.collections import PolyCollection

    corners = np.stack([(left, bottom), (left, top), (right, top), (right, bottom)])  # [corner, x or y, box]
    axis.add_collection(PolyCollection(list(corners.transpose(2, 0, 1)), linewidth=0.5, **style))
    axis.autoscale_view()


def heat_map(axis: Axes, values: Array, **options: Any) -> Any:
    """An image with whole numbers on both axes, the first row at the bottom."""
    image = axis.imshow(values, cmap=HEAT, aspect="auto", origin="lower", interpolation="nearest", **options)
    axis.set_xticks(_whole_numbers(values.shape[1]))
    axis.set_yticks(_whole_numbers(values.shape[0]))
    return image


def _whole_numbers(count: int) -> Array:
    """At most ten whole numbers from 0 to count - 1, evenly apart."""
    return np.arange(0, count, max(1, -(-count // 10)))


def whole_numbers(axis: Axes) -> None:
    """Ticks of the x axis at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def end_at_100(axis: Axes) -> None:
    """Ends the y axis of an accuracy in per cent at 100 at most; marks that lie there are drawn whole."""
    axis.set_ylim(top=min(axis.get_ylim()[1], 100))
    for line in axis.lines:
        if line.get_linestyle() == "None" and np.all(np.asarray(line.get_ydata(), dtype=float) <= 100):
            line.set_clip_on(False)


def name_ticks(axis: Axes, names: list[str]) -> None:
    """Names under bars or points, slanted where they would overlap."""
    shown = [short(name, 22) for name in names]
    crowded = max(map(len, shown), default=0) * len(shown) > 45
    axis.set_xticks(
        range(len(shown)), shown, rotation=30 if crowded else 0, ha="right" if crowded else "center"
    )


def thin(values: Array) -> Array:
    """Means of neighbours, so that no more than 1000 values remain."""
    width = -(-len(values) // 1000)
    if width <= 1:
        return values
    edges = np.arange(0, len(values), width)
    counts = np.diff(np.append(edges, len(values)))
    return np.asarray(np.add.reduceat(values, edges) / counts)


def save(figure: Figure, path: Path) -> None:
    """Write the figure; the ending decides the format (png, pdf, svg). Raises ResultsError if it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except ValueError as fault:
        raise ResultsError(
            f"cannot write the picture {path}: {fault}; end it with .png, .pdf or .svg"
        ) from fault
    except OSError as fault:
        raise ResultsError(
            f"cannot write the picture {path}: {os.strerror(fault.errno or 0)}; "
            "choose a folder with free space that this user can write to"
        ) from fault


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG without fonts from outside."""
    image = io.BytesIO()
    figure.savefig(image, format="svg", metadata={"Date": None})
    return image.getvalue()
