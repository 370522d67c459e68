"""What the control path costs with many ranks: real ones, on this one host, that do nothing else.

    python -m analysis.cluster.many_ranks --over mpi --ranks 2 8 32 128 256     # adds lines to many_ranks.jsonl
    python -m analysis.cluster.many_ranks --over gloo --ranks 2 8 32
    python -m analysis.cluster.many_ranks --table

Over MPI a rank is the control plane and the watch alone, which need no torch; over gloo ranks are forked from one
process that has loaded torch, and connect as under torchrun. Seconds are of the machine as it is; bytes and counts are
exact.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from d2ft_hpc.launch import Control, agreed, connect, detect, share
from d2ft_hpc.launch.channel import Channel
from d2ft_hpc.launch.mpi_control import MpiControl
from d2ft_hpc.launch.signals import StopSignals
from d2ft_hpc.launch.watch import Watch

RESULTS = Path(__file__).with_suffix(".jsonl")
PATIENCE_SECONDS = 400.0
RECORD_BYTES = 184
"""Of a step of one rank: its columns of the results, as `recording.steps` sends them."""
STEPS = 20
WATCHED_SECONDS = 3.0


def measure(control: Control, launched: float, plan: bytes, folder: Path) -> None:
    """On every rank, right after it has connected; rank 0 prints one line of JSON. Ends with a rank that is killed."""
    found: dict[str, float] = {"start": time.time() - launched}
    sent = _count_bytes()
    found["store_bytes"] = sent["bytes"]

    def timed(name: str, work: Callable[[], object]) -> None:
        control.barrier(PATIENCE_SECONDS)
        begun, cpu = time.perf_counter(), time.process_time()
        work()
        found[name], found[f"{name}_cpu"] = time.perf_counter() - begun, time.process_time() - cpu

    signals = StopSignals(["USR1"])
    begun = time.perf_counter()
    watch = Watch(control, silence_seconds=PATIENCE_SECONDS, run_folder=folder, signals=signals)
    found["watch"] = time.perf_counter() - begun
    timed("barrier", lambda: control.barrier(PATIENCE_SECONDS))
    timed("broadcast", lambda: control.broadcast(plan if control.rank == 0 else None))
    timed("hash", lambda: control.all_gather(b"h" * 32))
    timed("share", lambda: share(control, lambda: plan, "the plan"))
    with agreed(control, "nothing"):
        pass
    _record(control, timed, found)

    control.barrier(PATIENCE_SECONDS)
    before, cpu, begun = sent["bytes"], time.process_time(), time.perf_counter()
    time.sleep(WATCHED_SECONDS)
    watched = time.perf_counter() - begun
    found["watch_cpu_share"] = (time.process_time() - cpu) / watched
    found["watch_bytes_a_second"] = (sent["bytes"] - before) / watched

    control.barrier(PATIENCE_SECONDS)
    asked, step, before = time.time(), 0, sent["bytes"]
    while watch.at_step_boundary(step) != "stop":
        step += 1
        if step == 5 and control.rank == control.world_size - 1:
            asked = time.time()
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.005)
    found |= {"stop_bytes": sent["bytes"] - before, "stopped": time.time(), "asked": asked, "step": step}
    found["memory_kb"] = _own_memory_kb()
    every = [json.loads(each) for each in control.all_gather(json.dumps(found).encode())]
    if control.rank == 0:
        print(json.dumps(_of_all(every, len(plan))), flush=True)
    control.barrier(PATIENCE_SECONDS)
    if control.rank == control.world_size - 1:
        (folder / "killed").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(PATIENCE_SECONDS)


def _count_bytes() -> dict[str, int]:
    """Bytes that this process has sent over channels (the store's answers, the watch) from now on."""
    sent = getattr(Channel, "counted", {"bytes": 0})
    own = Channel.send_line
    if not hasattr(Channel, "counted"):

        def counting(channel: Channel, line: bytes) -> None:
            sent["bytes"] += len(line)
            own(channel, line)

        Channel.send_line = counting  # type: ignore[method-assign,assignment]
        Channel.counted = sent  # type: ignore[attr-defined]
    return sent


def _record(
    control: Control, timed: Callable[[str, Callable[[], object]], None], found: dict[str, float]
) -> None:
    """Steps' records to rank 0: what a step waits for, and when rank 0 has them all."""
    pending = []

    def begin() -> None:
        for _ in range(STEPS):
            pending.append(control.start_gather(b"r" * RECORD_BYTES))

    timed("record_begin", begin)
    begun = time.perf_counter()
    for gather in pending:
        of_ranks = gather.wait(PATIENCE_SECONDS)
        assert of_ranks is not None
        assert control.rank or len(of_ranks) == RECORD_BYTES * control.world_size
    found["record_end"] = time.perf_counter() - begun


def _own_memory_kb() -> float:
    """What this process alone holds, kB. Clean pages are not counted: they are a file's in the page cache, torch's
    libraries for instance, which are one process's or shared depending on who else runs on the host."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def _of_all(every: Sequence[dict[str, float]], plan_bytes: int) -> dict[str, Any]:
    """Seconds of the clock and the step's are the slowest rank's; bytes, processor seconds and memory rank 0's."""
    first, ranks = every[0], len(every)
    assert len({found["step"] for found in every}) == 1, "all ranks stop before the same step"
    asked = every[-1]["asked"]

    def slowest(name: str) -> float:
        return max(found[name] for found in every)

    seconds = ("start", "watch", "barrier", "broadcast", "hash", "share", "record_end")
    return {
        "ranks": ranks,
        **{f"{name}_seconds": slowest(name) for name in seconds},
        "record_step_seconds": slowest("record_begin") / STEPS,
        "record_step_cpu_seconds": slowest("record_begin_cpu") / STEPS,
        **{
            f"{name}_cpu_seconds_of_rank_0": first[f"{name}_cpu"]
            for name in ("barrier", "broadcast", "hash", "share")
        },
        "stop_seconds": slowest("stopped") - asked,
        "watch_cpu_share": first["watch_cpu_share"],
        "memory_kb": first["memory_kb"],
        "memory_kb_of_others": sum(found["memory_kb"] for found in every[1:]) / (ranks - 1),
        "plan_bytes": plan_bytes,
        "hash_bytes": 32 * ranks,
        "record_bytes": RECORD_BYTES * ranks,
        **{name: first[name] for name in ("store_bytes", "watch_bytes_a_second", "stop_bytes")},
    }


def run_mpi(ranks: int, launched: float, plan: bytes, folder: Path) -> None:
    """One rank under mpirun: what `connect` does before it loads torch."""
    environment = detect()
    control = MpiControl(
        environment.local_rank, init_timeout_seconds=PATIENCE_SECONDS, timeout_seconds=PATIENCE_SECONDS
    )
    measure(control, launched, plan, folder)


def run_gloo(ranks: int, launched: float, plan: bytes, folder: Path) -> None:
    """All ranks, forked, as under torchrun."""
    import torch

    torch.set_num_threads(1)
    launched = time.time()
    rank = next((rank for rank in range(1, ranks) if os.fork() == 0), 0)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpgrp() % 9999),
    }
    _count_bytes()
    control = connect(
        detect(),
        device_type="cpu",
        timeout_seconds=PATIENCE_SECONDS,
        collective_timeout_seconds=PATIENCE_SECONDS,
    )
    measure(control, launched, plan, folder)


def experiment(over: str, ranks: int) -> dict[str, Any]:
    """Starts the ranks and watches them to their end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "plan").write_bytes(_plan_message(ranks))
        command = [sys.executable, "-m", "analysis.cluster.many_ranks", "--over", over, "--ranks", str(ranks)]
        if over == "mpi":
            command = [str(Path(sys.executable).with_name("mpirun")), "-n", str(ranks), *command]
        job = subprocess.Popen(
            [*command, "--inside", name, str(time.time())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        found: dict[str, Any] = {"over": over}
        assert job.stdout is not None
        for line in job.stdout:
            if line.startswith("{"):
                found |= json.loads(line)
            elif f"rank {ranks - 1} " in line and "has closed its connection" in line:
                found.setdefault("lost_seconds", time.time() - float((folder / "killed").read_text()))
            elif "lost_seconds" not in found:
                print(line, end="", file=sys.stderr)
        job.wait()
        found["lost_all_ended_seconds"] = time.time() - float((folder / "killed").read_text())
    found["load"] = os.getloadavg()[0]
    return found


def _plan_message(replicas: int) -> bytes:
    """Of ViT-B, four micro-batches a replica; replicas follow the rows of eight, as in `make_plan`."""
    import numpy as np

    from d2ft_hpc.planning import SkipPlan

    few = np.random.default_rng(0).integers(0, 3, (4, 8, 12, 12), dtype=np.uint8)
    operations = few[:, np.arange(replicas) % 8].reshape(-1, 12, 12)
    return SkipPlan(operations, replicas, planner="joint", status="optimal").to_message()


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Every quantity against the number of ranks, and the power of it with which it grows from eight ranks on."""
    told = []
    for over in sorted({line["over"] for line in lines}):
        rows = sorted((line for line in lines if line["over"] == over), key=lambda line: line["ranks"])
        told += [f"| over {over} | " + " | ".join(str(row["ranks"]) for row in rows) + " | grows as |"]
        told += ["|---" * (len(rows) + 2) + "|"]
        start, end = next(row for row in rows if row["ranks"] >= min(8, rows[-1]["ranks"])), rows[-1]
        for name in (each for each in rows[0] if each not in ("over", "ranks")):
            values = " | ".join(f"{row.get(name, math.nan):.3g}" for row in rows)
            grown = ""
            if start is not end and start.get(name, 0) > 0 and end.get(name, 0) > 0:
                power = math.log(end[name] / start[name]) / math.log(end["ranks"] / start["ranks"])
                grown = f"N^{power:.2f}"
            told.append(f"| {name} | {values} | {grown} |")
        told.append("")
    return "\n".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(prog="many_ranks", description=__doc__)
    parser.add_argument("--over", choices=["mpi", "gloo"], default="mpi")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32, 128, 256])
    parser.add_argument("--table", action="store_true", help="print what is known")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        folder = Path(options.inside[0])
        run = run_mpi if options.over == "mpi" else run_gloo
        run(options.ranks[0], float(options.inside[1]), (folder / "plan").read_bytes(), folder)
    elif options.table:
        print(table([json.loads(line) for line in RESULTS.read_text().splitlines()]))
    else:
        for ranks in options.ranks:
            with RESULTS.open("a") as file:
                file.write(json.dumps(experiment(options.over, ranks)) + "\n")


if __name__ == "__main__":
    main()
