"""What recording costs: a synthetic run's records written, opened, summarised and drawn:

python -m analysis.cluster.recording --steps 10000 --ranks 64
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from d2ft_hpc import results
from d2ft_hpc.command import amount, whole_number
from d2ft_hpc.launch import run_guarded
from d2ft_hpc.paths import path_argument
from d2ft_hpc.report import report
from d2ft_hpc.results import ResultsWriter
from d2ft_hpc.results.schema import RANK_FIELDS, TABLES

_FLUSH_SECONDS = 5.0
_PLAN_EVERY = 1000
_EVALUATE_EVERY = 500


def benchmark(*, steps: int, ranks: int, step_seconds: float, folder: Path | None = None) -> dict[str, Any]:
    """Writes as a run of such steps would: an append a step, a flush every 5 s of it.

    append: what training waits for. flush: what a thread does meanwhile, in seconds of a core. Both are shares of the
    run's time. rival: the same rows into one open, resizable h5py file, flushed as often, which a kill would leave
    unreadable; the ratio is of core seconds. Other seconds are of the wall clock.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "run" / "results.h5"
        every = max(1, round(_FLUSH_SECONDS / step_seconds))
        written = _write(path, _rows(steps, ranks), every)
        opened = _timed(lambda: results.open(path).close())
        whole = _timed(lambda: _read_all(path))
        table = _timed(lambda: report([path]))
        page = _timed(lambda: report([path], page=Path(temporary) / "report.html"))
        size = path.stat().st_size
        rival = _write_rival(Path(temporary) / "rival.h5", _rows(steps, ranks), every, ranks)
    run_seconds = steps * step_seconds
    recording = written["append"] + written["flush"]
    return {
        "steps": steps,
        "ranks": ranks,
        "step_seconds": step_seconds,
        "append_seconds_per_step": written["append"] / steps,
        "append_share": written["append"] / run_seconds,
        "flush_share": written["flush"] / run_seconds,
        "largest_flush_seconds": written["largest"],
        "close_seconds": written["close"],
        "file_bytes": size,
        "open_seconds": opened,
        "read_all_seconds": whole,
        "summary_seconds": table,
        "page_seconds": page,
        "rival_seconds": rival,
        "over_rival": recording / rival,
    }


def as_text(measured: dict[str, Any]) -> str:
    """The measurements for a terminal."""
    m = measured
    return "\n".join(
        [
            f"{m['steps']} steps x {m['ranks']} ranks, steps of {1e3 * m['step_seconds']:g} ms, "
            f"a flush every {_FLUSH_SECONDS:g} s",
            f"training waits      {1e6 * m['append_seconds_per_step']:8.0f} us a step, "
            f"{m['append_share']:.3%} of its time",
            f"a thread flushes    {m['flush_share']:8.3%} of a core, "
            f"{1e3 * m['largest_flush_seconds']:.0f} ms at most",
            f"both over the rival {m['over_rival']:8.2f}  (one open h5py file: {m['rival_seconds']:.2f} s in all)",
            f"end: join           {m['close_seconds']:8.2f} s",
            f"file                {m['file_bytes'] / 1e6:8.1f} MB",
            f"open                {m['open_seconds']:8.3f} s",
            f"read everything     {m['read_all_seconds']:8.2f} s",
            f"summary             {m['summary_seconds']:8.2f} s",
            f"page, all plots     {m['page_seconds']:8.2f} s",
        ]
    )


def report_text(measured: dict[str, Any], as_json: bool) -> str:
    """The measurements as JSON or for a terminal."""
    return json.dumps(measured) if as_json else as_text(measured)


def _rows(steps: int, ranks: int) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    flops = np.full(ranks, 1e12)
    parts = dict(
        zip(
            ("data", "forward", "backward", "communication", "optimizer", "other"),
            (1, 30, 60, 8, 3, 1),
            strict=True,
        )
    )
    for step in range(steps):
        seconds = {
            f"{name}_seconds": 1e-3 * mean * random.gamma(20, 1 / 20, ranks) for name, mean in parts.items()
        }
        yield {
            "step": step,
            "epoch": step // _EVALUATE_EVERY,
            "plan": step // _PLAN_EVERY,
            "loss": 1 + random.random() / (1 + step),
            "learning_rate": 1e-3,
            "gradient_norm": random.random(),
            "samples": 64 * ranks,
            "rank_loss": random.random(ranks),
            "rank_samples": np.full(ranks, 64),
            "dense_flops": flops,
            "planned_flops": 0.6 * flops,
            "executed_flops": 0.6 * flops,
            "bytes_sent": flops / 1e4,
            "all_reduce_bytes": flops / 1e4,
            "memory_bytes": 1e10 + 1e6 * random.integers(0, 100, ranks),
            **seconds,
            "step_seconds": sum(seconds.values()),
            "waiting_seconds": seconds["communication_seconds"] / 2,
            "recording_seconds": 1e-4 * random.random(ranks),
        }


def _write(path: Path, rows: Iterator[dict[str, Any]], flush_every: int) -> dict[str, float]:
    seconds = {"append": 0.0, "flush": 0.0, "largest": 0.0}
    random = np.random.default_rng(1)
    writer = ResultsWriter(path, flush_seconds=1e9)
    for row in rows:
        step = row["step"]
        if step % _PLAN_EVERY == 0:
            operations = random.integers(0, 3, (32, 12, 6), dtype=np.uint8)
            scores = random.random((32, 12, 6), dtype=np.float32)
            writer.append("scores", {"step": step, "forward": scores, "backward": scores, "seconds": 1.0})
            writer.append("plans", {"step": step, "operations": operations, "solve_seconds": 1.0})
        start = time.thread_time()
        writer.append("steps", row)
        seconds["append"] += time.thread_time() - start
        if step % _EVALUATE_EVERY == _EVALUATE_EVERY - 1:
            confusion = random.integers(0, 100, (100, 100))
            accuracy: dict[str, Any] = {"accuracy": random.random(), "class_accuracy": random.random(100)}
            writer.append("evaluations", {"step": step + 1, "confusion": confusion, **accuracy})
        if step % flush_every == flush_every - 1:
            core = time.thread_time()
            flushed = _timed(writer.flush)
            seconds["flush"] += time.thread_time() - core
            seconds["largest"] = max(flushed, seconds["largest"])
    return {**seconds, "close": _timed(writer.close)}


def _write_rival(path: Path, rows: Iterator[dict[str, Any]], flush_every: int, ranks: int) -> float:
    """Core seconds to append the same rows to one open file."""
    total = 0.0
    with h5py.File(path, "w") as file:
        for row in rows:
            start = time.thread_time()
            if row["step"] == 0:
                for name in row:
                    shape = (ranks,) if name in RANK_FIELDS else ()
                    kind = TABLES["steps"][name].kind
                    file.create_dataset(
                        name, (0, *shape), kind, maxshape=(None, *shape), chunks=(256, *shape)
                    )
            for name, value in row.items():
                file[name].resize(row["step"] + 1, axis=0)
                file[name][-1] = value
            if row["step"] % flush_every == flush_every - 1:
                file.flush()
                with path.open("rb") as same:
                    os.fsync(same.fileno())
            total += time.thread_time() - start
    return total


def _read_all(path: Path) -> None:
    with results.open(path) as run:
        run.contents()


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(prog="recording", description=__doc__)
    parser.add_argument("--steps", type=whole_number(1), default=10_000)
    parser.add_argument("--ranks", type=whole_number(1), default=64)
    parser.add_argument("--step-seconds", type=amount, default=0.1, help="how long a step would take")
    parser.add_argument("--folder", type=path_argument, help="where to write (default: the temporary folder)")
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    return run_guarded(None, lambda: print(report_text(benchmark(**options), as_json)))


if __name__ == "__main__":
    sys.exit(main())
