"""The report on runs: a table for the terminal, and one HTML page that needs nothing but a browser."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterator, Sequence
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
from d2ft_hpc.figures.run import Run, Runs
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
    """Compare runs; the first is the one that times are relative to.

    Args:
        run_paths: results files or run folders.
        page: where to write the HTML page, None for none.
        png: where to write one picture of compute and time, None for none.
        reference: runs whose accuracy the others are to match, apart from `margin` points of top-1.

    Returns:
        As plain text: the table, what plans with too many shapes to compile lost, and the least compute and time that
        match the reference.

    Raises:
        ResultsError: a run cannot be read, or the page or picture cannot be written.
    """
    if not run_paths:
        raise ResultsError("no runs to report on: give at least one results file or run folder")
    with Runs(run_paths) as runs, Runs(reference) as references:
        if page is not None:  # before anything is drawn
            with _writing(page):
                page.parent.mkdir(parents=True, exist_ok=True)
        numbers = summary.measure(runs)
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
        head, *rows = sufficient.table(enough)
        told = "".join(f"<p>{html.escape(text)}.</p>" for text in sufficient.sentences(enough))
        caption = "Finished runs against those of --reference, paired by seed."
        sections.insert(
            1, ("How little is enough", told + _table(head, rows) + _figure(sufficient.draw(enough), caption))
        )
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
    table = _table(titles, summary.table(numbers)[3:])
    unfinished = [run.name for run in runs if not run.complete]
    note = f"<p>Did not end in order: {html.escape(', '.join(unfinished))}.</p>" if unfinished else ""
    note += "".join(
        f"<p>{html.escape(text)}</p>" for text in free_shapes.sentences(free_shapes.measure(runs))
    )
    note += "".join(f"<p>{html.escape(text)}.</p>" for text in summary.notes(numbers))
    yield "Summary", table + note + _figure(summary.draw(numbers), "Compute and time of each run.")
    yield (
        "Learning",
        _figure(
            learning.draw(learning.measure(runs)),
            "Loss and accuracy against measured time: the slowest rank of every step, with scoring and planning.",
        ),
    )
    if len(runs) > 1:
        costs = pareto.measure(runs)
        yield (
            "Accuracy against cost",
            _figure(pareto.draw(costs), "Up and to the left is better.") + _rivals(costs["rivals"]),
        )
        groups = compare.measure(runs)
        if any(len(group["runs"]) > 1 for group in groups["groups"]):
            caption = "Runs that differ in their seed alone are one group; ± is half the 95 % interval."
            head, *rows = compare.table(groups)
            yield "Over seeds", _figure(compare.draw(groups), caption) + _table(head, rows)
        claims = paper.measure(runs)
        if any(run["claim"] for run in claims["runs"]):
            head, *rows = paper.table(claims)
            caption = "What each run saved and lost against the dense runs of the same model and data."
            yield "Beside the paper", _table(head, rows) + _figure(paper.draw(claims), caption)
    yield from _if_recorded(
        "Promised and measured",
        predicted,
        runs,
        "A point for each plan; on the diagonal the promise was kept.",
    )
    yield from _if_recorded(
        "Work and waiting by rank",
        workload,
        runs,
        "Waiting: for slower ranks, before communication can begin.",
    )
    yield from _if_recorded(
        "Some steps of all ranks",
        gantt,
        runs,
        "Phases are sums over a step; their order within the step is a drawing, not a record.",
    )
    sparse = [run for run in runs if not run.is_dense]
    if sparse:
        caption = (
            "The size of training images over the steps, if plans set it; and if they skip heads, the share of "
            "micro-batches, or of heads, that run each operation."
        )
        yield from _if_recorded("Plans", plans, sparse, caption)
        yield from _if_recorded(
            "Scores", scores, sparse, "Contribution scores that the last plan was made from."
        )
    yield from _if_recorded("Classes", classes, runs, "The last evaluation.")
    yield "Configuration", "".join(_configuration(run) for run in runs)


def _if_recorded(title: str, figure: Any, runs: Sequence[Run], caption: str) -> Iterator[tuple[str, str]]:
    try:
        drawn = _figure(figure.draw(figure.measure(runs)), caption)
    except ResultsError:
        return
    except (
        ArithmeticError,
        LookupError,
        ValueError,
    ) as error:  # from records that are damaged or hold no numbers
        drawn = f"<p>Cannot be drawn from what is recorded: {html.escape(one_line(str(error)))}.</p>"
    yield title, drawn


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
    return _table(head, rows)


def _configuration(run: Run) -> str:
    yaml = html.escape(str(run.results.datasets("config").get("yaml", "not recorded")))
    facts = {**run.results.attributes("environment"), **run.results.attributes("model")}
    rows = [
        [str(key), number(value, ",.6g") if isinstance(value, float) else str(value)]
        for key, value in facts.items()
    ]
    return (
        f"<details><summary>{html.escape(run.name)} ({html.escape(str(run.path))})</summary>"
        f"<pre>{yaml}</pre>{_table(['environment and model', ''], rows)}</details>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(kind: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(text)}</{kind}>" for text in texts) + "</tr>"

    body = "".join(cells("td", row) for row in rows)
    return f'<div class="wide"><table><thead>{cells("th", head)}</thead><tbody>{body}</tbody></table></div>'


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
