"""Runs a script as if started by itself, then fails if gloo's threads outlive it: a process that exits under them may
abort.

    python tests/distributed/run_example.py SCRIPT
"""

import runpy
import sys
from pathlib import Path

variables = runpy.run_path(sys.argv[1], run_name="__main__")  # kept, as a script's are until it exits
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
left = sorted(name for name in names if "gloo" in name)
if left:
    sys.exit(f"{sys.argv[1]}: process groups outlive the script: {left}")
