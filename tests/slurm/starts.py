"""Starts short jobs over `srun --mpi=pmi2` on two virtual nodes, and counts those that came up.

    python -m tests.slurm.starts FILE [--starts 20] [--tasks 2] [--netmod ofi]

FILE gets one JSON line a start of `train`, `score` and `doctor`; started again, the count goes on from there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.slurm.cluster import REPOSITORY, Cluster
from tests.soak.kills import commit

NODES = 2
LIMIT_SECONDS = 180
SHORT = ["configs/demo.yaml", "engine.name=ddp", "data.micro_batch_size=8", "data.slots=2"]
COMMANDS = {
    "train": ["train", *SHORT, "train.epochs=1", "train.steps_share=0.1", "train.evaluate_at_start=false"],
    "score": ["score", "{folder}/scores.h5", *SHORT, "plan.planner=joint", "data.train_fraction=0.1"],
    "doctor": ["doctor", *SHORT],
}


def start(cluster: Cluster, command: str, tasks: int, netmod: str) -> dict[str, object]:
    """Starts a command and waits for its end; what happened."""
    folder = Path(tempfile.mkdtemp(dir=cluster.folder))
    ranks = [
        f"--nodes={NODES}",
        f"--ntasks-per-node={tasks}",
        "--mpi=pmi2",
        "--kill-on-bad-exit=1",
        "--label",
    ]
    words = [word.format(folder=folder) for word in COMMANDS[command]]
    began = time.monotonic()
    try:
        finished = subprocess.run(
            ["srun", *ranks, sys.executable, "-m", "d2ft_hpc", *words, f"run.folder={folder}"],
            cwd=REPOSITORY,
            env={**cluster.environ, "MPIR_CVAR_CH4_NETMOD": netmod},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_SECONDS,
        )
        status, shown = finished.returncode, finished.stdout
    except subprocess.TimeoutExpired as error:
        cluster.cancel_all()
        status, shown = None, (error.stdout or b"").decode(errors="replace")
    shutil.rmtree(folder)
    record: dict[str, object] = {"command": command, "came_up": status == 0, "status": status}
    record["seconds"] = round(time.monotonic() - began, 1)
    return record if status == 0 else {**record, "shown": shown[-2000:]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--starts", type=int, default=20, help="of each command")
    parser.add_argument("--tasks", type=int, default=2, help="ranks of a node")
    parser.add_argument("--netmod", choices=("ofi", "ucx"), default="ofi", help="what MPICH sends over")
    options = parser.parse_args()
    of = {"nodes": NODES, "tasks_per_node": options.tasks, "netmod": options.netmod}
    records = (
        [json.loads(line) for line in options.file.read_text().splitlines()] if options.file.exists() else []
    )
    done = Counter(record["command"] for record in records if record.items() >= of.items())
    scratch = Path(tempfile.mkdtemp(prefix="d2ft-"))
    cluster = Cluster(scratch / "slurm")
    cluster.start()
    try:
        for number in range(options.starts):
            for command in COMMANDS:
                if done[command] > number:
                    continue
                record = {**start(cluster, command, options.tasks, options.netmod), **of, "commit": commit()}
                records.append(record)
                with options.file.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    finally:
        cluster.stop()
        shutil.rmtree(scratch)
    for command in COMMANDS:
        mine = [r for r in records if r["command"] == command and r.items() >= of.items()]
        print(f"{command}: {sum(r['came_up'] for r in mine)} of {len(mine)} starts came up")


if __name__ == "__main__":
    main()
