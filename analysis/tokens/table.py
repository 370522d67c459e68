"""One line for each setting in results of explore.py: `table.py r1.jsonl r2.jsonl r3.jsonl`.

Data set, epochs, name, compute, top-1 and loss of each run in the order of seeds and folds, mean top-1, settings.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any


def main(paths: list[str]) -> None:
    groups: dict[tuple[str, float, str], list[tuple[int, int, dict[str, Any]]]] = defaultdict(list)
    for line in "".join(Path(path).read_text() for path in paths).splitlines():
        run = json.loads(line)
        settings = dict(part.split("=") for part in run["settings"].split(",") if part)
        seed, fold = int(settings.pop("seed", 0)), int(settings.pop("fold", 0))
        key = ",".join(f"{name}={value}" for name, value in sorted(settings.items()))
        groups[run["data"], run["epochs"], key].append((seed, fold, run))
    rows = []
    for (data, epochs, settings_of), found in groups.items():
        runs = [run for _, _, run in sorted(found, key=lambda one: one[:2])]
        top1 = {size: [run["top1"][size] for run in runs] for size in runs[0]["top1"]}
        tested = "; ".join(
            f"{size} px: {', '.join(f'{v:.2f}' for v in values)} (mean {mean(values):.2f} of {len(values)})"
            for size, values in top1.items()
        )
        losses = ", ".join(f"{next(iter(run['nll'].values())):.3f}" for run in runs)
        best = max(mean(values) for values in top1.values())
        names = "/".join(sorted({run["name"] for run in runs}))
        text = f"{data:10} {epochs:4g} {names:15} {runs[0]['compute']:.3f}  {tested}  nll {losses}  {settings_of}"
        rows.append((data, epochs, round(runs[0]["compute"], 1), best, text))
    for *_, text in sorted(rows):
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
