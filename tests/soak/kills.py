"""Kills random ranks of a small run at random times, again and again, and starts it again each time.

    python -m tests.soak.kills FILE [--kills 200] [--minutes 60]

After each kill: the job has ended within a bounded time and left no process, its results open and hold the losses of
an uninterrupted run, bit for bit, and every checkpoint is whole. When a run comes to its end, all its losses and its
weights are those of the uninterrupted run. FILE gets one JSON line a kill; started again, the soak goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from d2ft_hpc.results import open_run
from d2ft_hpc.training.checkpoint import complete_checkpoints, verify
from tests.distributed.launching import REPOSITORY, mpirun

RANKS = 2
MARK = "D2FT_SOAK"
"""Variable by which the processes of a run are told from all others."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
LIMIT_SECONDS = 60
"""After the kill, within which the job must have ended."""
LONGEST_WAIT_SECONDS = {"start": 14.0, "first step": 6.0}
"""Of the kill, after what it is counted from: half of the kills each, so that a slow start is not all they meet."""
OPTIONS = [
    "data.micro_batch_size=4",
    "data.slots=2",
    "data.train_fraction=0.5",
    "train.epochs=2",
    "train.checkpoint_every=8 steps",
    "train.resume=auto",
    "plan.planner=paper",
    "plan.replan.every=15 steps",
    "launch.silence_seconds=4",
    "launch.timeout_seconds=15",
]


def commit() -> str:
    """Of the code that runs; "+" after it says that files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--exclude=*", "--dirty=+"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip()


def start(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [mpirun(), "-n", str(RANKS), sys.executable, "-m", "d2ft_hpc", "train", "configs/demo.yaml"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), MARK: str(folder)}
    with log.open("ab") as output:
        return subprocess.Popen(
            [*command, f"run.folder={folder}", *OPTIONS],
            cwd=REPOSITORY,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


def processes(folder: Path) -> dict[int, list[str]]:
    """Those that `start` brought about and that still run, with their environments."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                environ = (entry / "environ").read_text(errors="replace").split("\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if f"{MARK}={folder}" in environ and state != "Z":
                    found[int(entry.name)] = environ
            except OSError:
                continue
    return found


def rank_processes(folder: Path) -> dict[int, int]:
    """Process by rank."""
    found = {}
    for pid, environ in processes(folder).items():
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        rank = next((v.partition("=")[2] for v in environ if v.startswith("PMI_RANK=")), None)
        if rank is not None and f"run.folder={folder}" in arguments:
            found[int(rank)] = pid
    return found


def kill_one(
    job: subprocess.Popen[bytes], folder: Path, log: Path, record: dict[str, Any], choice: random.Random
) -> Any:
    """Waits, then signals a random rank; (signal, rank), or None if the job had ended before.

    `log` is what the job prints.
    """
    since = choice.choice(sorted(LONGEST_WAIT_SECONDS))
    record |= {"since": since, "after_seconds": round(choice.uniform(0, LONGEST_WAIT_SECONDS[since]), 2)}
    counted_from = time.monotonic() if since == "start" else None
    while counted_from is None or time.monotonic() < counted_from + record["after_seconds"]:
        if job.poll() is not None:
            return None
        if counted_from is None and "  step " in log.read_text(errors="replace"):
            counted_from = time.monotonic()
        time.sleep(0.02)
    victims = rank_processes(folder)
    if not victims:
        return None
    rank, number = choice.choice(sorted(victims)), choice.choice(SIGNALS)
    try:
        os.kill(victims[rank], number)
    except ProcessLookupError:
        return None
    return number, rank


def faults_of(folder: Path, reference: Path, *, finished: bool) -> list[str]:
    """What is not as it must be in the run's folder."""
    faults = []
    for checkpoint in complete_checkpoints(folder / "checkpoints"):
        try:
            verify(checkpoint)
        except Exception as error:
            faults.append(f"{checkpoint.name}: {error}")
    if not (folder / "results.h5").exists():
        return [*faults, "no results file"] if finished else faults
    try:
        with open_run(folder) as run, open_run(reference) as whole:
            own, expected = run.table("steps"), whole.table("steps")
            rows = len(own["step"])
            for column in ("step", "loss", "learning_rate", "plan"):
                if not np.array_equal(own[column], expected[column][:rows]):
                    faults.append(f"{column} differs from the uninterrupted run")
            if finished and (not run.complete or rows != len(expected["step"])):
                faults.append(f"finished with {rows} of {len(expected['step'])} steps")
            if finished and not np.array_equal(*(r.table("evaluations")["loss"] for r in (run, whole))):
                faults.append("evaluations differ from the uninterrupted run")
    except Exception as error:
        faults.append(f"results: {error!r}")
    if finished:
        one, other = (load_file(path / "model.safetensors") for path in (folder, reference))
        if not all(bool((one[name] == other[name]).all()) for name in other):
            faults.append("weights differ from the uninterrupted run")
    return faults


def one_launch(root: Path, choice: random.Random, record: dict[str, Any]) -> None:
    """Starts or continues the run below `root`, kills it, and adds what happened to `record`."""
    folder, log = root / "run", root / f"launch-{record['launch']}.txt"
    job = start(folder, log)
    killed = kill_one(job, folder, log, record, choice)
    signalled = time.monotonic()
    try:
        record["status"] = job.wait(LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        record["faults"].append(f"did not end within {LIMIT_SECONDS} s")
    if killed:
        record |= {"signal": signal.Signals(killed[0]).name, "rank": killed[1]}
        record["ended_after_seconds"] = round(time.monotonic() - signalled, 2)
    time.sleep(0.2)
    left = processes(folder)
    if left:
        record["faults"].append(f"{len(left)} processes left behind")
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    record["finished"] = record.get("status") == 0
    record["faults"] += faults_of(
        folder / "demo", root.parent / "reference" / "demo", finished=record["finished"]
    )
    with (
        open_run(folder / "demo")
        if (folder / "demo" / "results.h5").exists()
        else open_run(root.parent / "reference" / "demo") as run
    ):
        record["steps"] = len(run.table("steps")["step"]) if run.path.is_relative_to(folder) else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument(
        "--minutes", type=float, default=600, help="stop after this time; start again to go on"
    )
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    options.file.parent.mkdir(parents=True, exist_ok=True)
    records = (
        [json.loads(line) for line in options.file.read_text().splitlines()] if options.file.exists() else []
    )
    scratch = Path(tempfile.gettempdir()) / f"d2ft-soak-{options.file.resolve().as_posix().replace('/', '-')}"
    if not (scratch / "reference" / "demo" / "model.safetensors").exists():
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        if start(scratch / "reference", scratch / "reference.txt").wait(1200):
            sys.exit((scratch / "reference.txt").read_text())
    kills = sum("signal" in record for record in records)
    while kills < options.kills and time.monotonic() < deadline:
        choice = random.Random(f"{options.file.name} {len(records)}")
        record: dict[str, Any] = {"launch": len(records), "commit": commit(), "faults": []}
        root = scratch / "killed"
        root.mkdir(exist_ok=True)
        one_launch(root, choice, record)
        kills += "signal" in record
        if record["finished"]:
            shutil.rmtree(root)
        if record["faults"]:
            shutil.move(root, scratch / f"faulty-{len(records)}")
        records.append(record)
        with options.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
    print(summary(records))
    return int(any(record["faults"] for record in records))


def summary(records: list[dict[str, Any]]) -> str:
    killed = [record for record in records if "signal" in record]
    counts = Counter(record["signal"] for record in killed)
    longest = {
        name: max(record["ended_after_seconds"] for record in killed if record["signal"] == name)
        for name in counts
    }
    faulty = [record for record in records if record["faults"]]
    by_signal = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
    lines = [
        f"{len(killed)} kills ({by_signal}) in {len(records)} launches,"
        f" {sum(record['finished'] for record in records)} runs finished, {len(faulty)} launches with faults",
        "longest time from the signal to the end of the job: "
        + ", ".join(f"{seconds:.1f} s after {name}" for name, seconds in sorted(longest.items())),
    ]
    return "\n".join(
        lines + [f"launch {record['launch']}: {'; '.join(record['faults'])}" for record in faulty]
    )


if __name__ == "__main__":
    sys.exit(main())
