"""The paper's table from runs on CIFAR-10: `table.py add RUN...` appends a line a run to results.jsonl, `table.py`
prints the tables of README.md from it and draws pareto.png. Differences are paired by seed."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from d2ft_hpc.figures.run import Run

LINES = Path(__file__).with_name("results.jsonl")
SUBJECTS = ("samples", "samples_lora")
PARTS = {1.0: "all", 0.1: "tenth"}

Line = dict[str, Any]
Key = tuple[Any, ...]


def line_of(folder: Path) -> Line:
    """What is kept of a run. `tflop`: executed, scoring included."""
    run = Run(folder / "results.h5", folder.name)
    try:
        config = run.config
        data, plan = config["data"], config["plan"]
        scored = run.results.table("scores", ["flops"])["flops"]
        return {
            "data": PARTS[data["train_fraction"]],
            "epochs": config["train"]["epochs"],
            "budget": 1.0 if run.is_dense and config["train"]["steps_share"] == 1 else plan["compute_budget"],
            "config": folder.name.split("--")[0],
            "seed": config["run"]["seed"],
            "evaluated_on": data["evaluate_on"],
            "steps": len(run.steps["step"]),
            "tflop": round((run.total_flops + float(np.nansum(scored))) / 1e12, 1),
            "planned_compute": round(run.planned_compute, 4),
            "executed_compute": round(run.measured_compute, 4),
            "scoring_tflop": round(float(np.nansum(scored)) / 1e12, 1),
            "accuracy": round(run.accuracy, 4),
        }
    finally:
        run.close()
