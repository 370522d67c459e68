"""The report on runs: a table for the terminal, and one HTML page that needs nothing but a browser."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from d2ft_hpc import __version__
from d2ft_hpc.errors import ResultsError
from d2ft_hpc.figures import (
    classes,
    compare,
    free_shapes,
    gantt,
    learning,
    paper,
    pareto,
    plans,
    predicted,
    scores,
    sufficient,
    summary,
    workload,
)
from d2ft_hpc.figures.run import Run, open_runs
from d2ft_hpc.figures.style import number, save, to_svg
from d2ft_hpc.safe_text import one_line

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1180px;
       margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid #888; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
tbody tr:nth-child(even) { background: #f4f4f4; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #444; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: 13px; }
nav a { margin-right: 1rem; }
"""


def report(
    run_paths: Sequence[Path],
    *,
    page: Path | None = None,
    png: Path | None = None,
    reference: Sequence[Path] = (),
    margin: float = 0.5,
) -> str:
    """Compares runs, by results files or run folders; the first is the one that times are relative to.

    page: where to write the HTML page; None: nowhere. png: the same of a picture of compute and time.
    reference: runs whose accuracy the others are to match, apart from `margin` points of top-1.

    Returns plain text: the table, what plans with too many shapes to compile lost, and the least compute and time that
    match the reference. Raises ResultsError if a run cannot be read, or the page or picture cannot be written.
    """
    if not run_paths:
        raise ResultsError("no runs to report on: give at least one results file or run folder")
    with open_runs(run_paths) as runs, open_runs(reference) as references:
        if page is not None:  # before anything is drawn
            with _writing(page):
                page.parent.mkdir(parents=True, exist_ok=True)
        numbers = summary.measure(runs, references)
        enough = sufficient.measure(runs, references, margin) if references else None
        if png is not None:
            save(summary.draw(numbers), png)
        if page is not None:
            text = _page(runs, numbers, enough)
            with _writing(page):
                page.write_text(text, encoding="utf-8")
        lines = [summary.as_text(numbers), *free_shapes.sentences(free_shapes.measure(runs))]
        return "\n".join(lines + ([] if enough is None else sufficient.sentences(enough)))


def _page(runs: Sequence[Run], numbers: dict[str, Any], enough: dict[str, Any] | None) -> str:
    sections = list(_sections(runs, numbers))
    if enough is not None:
        told = _paragraphs(f"{text}." for text in sufficient.sentences(enough))
        figure = _figure(
            sufficient.draw(enough), "Finished runs against those of --reference, paired by seed."
        )
        sections.insert(1, ("How little is enough", told + _table(sufficient.table(enough)) + figure))
    links = "".join(f'<a href="#s{i}">{html.escape(title)}</a>' for i, (title, _) in enumerate(sections))
    bodies = "".join(
        f'<h2 id="s{i}">{html.escape(title)}</h2>\n{body}\n' for i, (title, body) in enumerate(sections)
    )
    names = html.escape(", ".join(run.name for run in runs))
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>d2ft-hpc: {names}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>Runs: {names}</h1><p>Made by d2ft-hpc {__version__}, {now}.</p><nav>{links}</nav>\n"
        f"{bodies}</body></html>\n"
    )


def _sections(runs: Sequence[Run], numbers: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Titles and contents, as HTML; what no run recorded is left out."""
    *heads, last = summary.table(numbers)[:3]
    titles = [" ".join(filter(None, parts)) for parts in zip(*heads, last, strict=True)]
    states = dict.fromkeys(run.state for run in runs if run.state)
    notes = [
        f"{state.capitalize()}: {', '.join(run.name for run in runs if run.state == state)}."
        for state in states
    ]
    notes += free_shapes.sentences(free_shapes.measure(runs))
    notes += [f"{text}." for text in summary.notes(numbers)]
    figure = _figure(summary.draw(numbers), "Compute and time of each run.")
    yield "Summary", _table([titles, *summary.table(numbers)[3:]]) + _paragraphs(notes) + figure
    caption = (
        "Loss and accuracy against measured time: the slowest rank of every step, with scoring and planning."
    )
    yield "Learning", _figure(learning.draw(learning.measure(runs)), caption)
    if len(runs) > 1:
        costs = pareto.measure(runs)
        figure = _figure(pareto.draw(costs), "Up and to the left is better.")
        yield "Accuracy against cost", figure + _rivals(costs["rivals"])
        groups = compare.measure(runs)
        if any(len(group["runs"]) > 1 for group in groups["groups"]):
            caption = "Runs that differ in their seed alone are one group; ± is half the 95 % interval."
            yield "Over seeds", _figure(compare.draw(groups), caption) + _table(compare.table(groups))
        claims = paper.measure(runs)
        if any(run["claim"] for run in claims["runs"]):
            caption = (
                "What each run saved in a step, and lost, against the dense runs of the same model and data."
            )
            yield "Beside the paper", _table(paper.table(claims)) + _figure(paper.draw(claims), caption)
    for title, (module, caption) in _IF_RECORDED.items():
        shown = [run for run in runs if not run.is_dense] if module in (plans, scores) else runs
        if drawn := _if_recorded(module, shown, caption):
            yield title, drawn
    yield "Configuration", "".join(_configuration(run) for run in runs)


_IF_RECORDED: dict[str, tuple[Any, str]] = {
    "Promised and measured": (predicted, "A point for each plan; on the diagonal the promise was kept."),
    "Work and waiting by rank": (workload, "Waiting: for slower ranks, before communication can begin."),
    "Some steps of all ranks": (
        gantt,
        "Phases are sums over a step; their order within the step is a drawing, not a record.",
    ),
    "Plans": (
        plans,
        "The size of training images over the steps, if plans set it; and if they skip heads, the share of "
        "micro-batches, or of heads, that run each operation.",
    ),
    "Scores": (scores, "Contribution scores that the last plan was made from."),
    "Classes": (classes, "The last evaluation."),
}
"""Figures that need no other run, and their captions, by title."""


def _if_recorded(figure: Any, runs: Sequence[Run], caption: str) -> str:
    if not runs:
        return ""
    try:
        return _figure(figure.draw(figure.measure(runs)), caption)
    except ResultsError:
        return ""
    except (
        ArithmeticError,
        LookupError,
        ValueError,
    ) as error:  # from damaged records, or those without numbers
        return _paragraphs([f"Cannot be drawn from what is recorded: {one_line(str(error))}."])


def _rivals(rivals: list[dict[str, Any]]) -> str:
    if not rivals:
        return ""
    head = [
        "run",
        "top-1 %",
        "dense run of equal compute",
        "its top-1 %",
        "top-1 % of a longer dense run after that compute",
    ]
    rows = [
        [
            rival["run"],
            number(100 * rival["accuracy"], ".2f"),
            rival["dense_of_equal_compute"] or "none among these runs",
            "-" if rival["its_accuracy"] is None else number(100 * rival["its_accuracy"], ".2f"),
            number(100 * rival["dense_on_its_way"], ".2f"),
        ]
        for rival in rivals
    ]
    return _table([head, *rows])


def _configuration(run: Run) -> str:
    yaml = html.escape(str(run.results.datasets("config").get("yaml", "not recorded")))
    facts = {**run.results.attributes("environment"), **run.results.attributes("model")}
    rows = [
        [str(key), number(value, ",.6g") if isinstance(value, float) else str(value)]
        for key, value in facts.items()
    ]
    return (
        f"<details><summary>{html.escape(run.name)} ({html.escape(str(run.path))})</summary>"
        f"<pre>{yaml}</pre>{_table([['environment and model', ''], *rows])}</details>"
    )


def _paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the heading."""

    def cells(kind: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(text)}</{kind}>" for text in texts) + "</tr>"

    body = "".join(cells("td", row) for row in rows[1:])
    return (
        f'<div class="wide"><table><thead>{cells("th", rows[0])}</thead><tbody>{body}</tbody></table></div>'
    )


def _figure(figure: Any, caption: str) -> str:
    image = base64.b64encode(to_svg(figure)).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{image}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


@contextmanager
def _writing(page: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise ResultsError(
            f"cannot write the page {page}: {os.strerror(fault.errno or 0)}; "
            "choose a folder with free space that this user can write to (--html)"
        ) from fault
