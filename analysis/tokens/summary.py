"""The means that the first page of the project quotes, from results of explore.py.

`python analysis/tokens/summary.py > analysis/tokens/summary.jsonl`: a line for each data set, length and budget of the
planner `tokens`, the worst first. Accuracies are top-1 in per cent on images left out of the training set; `dense` is
the mean over the same seeds or folds. The rival is the best other way to spend about as much compute that was run.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

FOLDER = Path(__file__).parent
COMPARED = (
    # data set, epochs, run, dense run, rival and the side of the images that it is tested at
    ("Caltech-101", 10, "k_c4_h", "k_dense_h", None, None),
    ("Caltech-101", 10, "k_c6_h", "k_dense_h", "k_low168", "168"),
    ("CIFAR-10", 1, "t_c4_98hb", "t_dense_hb", None, None),
    ("CIFAR-100", 1, "c4_hv", "dense_hbv", "small4", "224"),
    ("CIFAR-100", 1, "c6_hb", "dense_hb", "low168", "168"),
    ("CIFAR-100", 3, "e3_c4_98hv", "e3_dense_hb", None, None),
    ("CIFAR-100", 3, "e3_c6_hv", "e3_dense_hb", None, None),
)


def main() -> None:
    runs: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for file in sorted(FOLDER.glob("r?.jsonl")):
        for line in file.read_text().splitlines():
            run = json.loads(line)
            settings = dict(part.split("=") for part in run["settings"].split(",") if part)
            runs.setdefault(run["name"], {})[settings.get("seed", "0"), settings.get("fold", "0")] = run
    rows = []
    for data, epochs, name, dense_name, rival, tested_at in COMPARED:
        both = sorted(runs[name].keys() & runs[dense_name].keys())
        accuracy, dense = (
            mean(runs[each][key]["top1"]["224"] for key in both) for each in (name, dense_name)
        )
        row = {
            "data": data,
            "epochs": epochs,
            "compute": runs[name][both[0]]["compute"],
            "accuracy": round(accuracy, 3),
            "dense": round(dense, 3),
            "difference": round(accuracy - dense, 3),
            "runs": len(both),
        }
        if rival is not None:
            (other,) = runs[rival].values()
            row |= {
                "rival": rival,
                "rival_compute": other["compute"],
                "rival_accuracy": other["top1"][tested_at],
            }
        rows.append(row)
    for row in sorted(rows, key=lambda row: row["difference"]):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
