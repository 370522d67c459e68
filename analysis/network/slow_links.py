"""Bytes and step times over slow links, under a dense, the paper's and a makespan plan:

    python -m analysis.network.slow_links --rate 100mbit --tp 4

The ranks run on this machine, each in a network namespace of its own, joined by veth pairs and a bridge with tc's token
bucket on both ends of every pair. The namespaces have no names: they live in the processes of this command alone, so
that the kernel removes them with everything in them when these end, however they end, and nothing else is touched.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2ft_hpc.command import share, whole_number
from d2ft_hpc.errors import ConfigError, LaunchError
from d2ft_hpc.launch import run_guarded

_SWITCH = "--switch"
"""First argument of the process that holds the bridge."""
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of sched.h
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl.h
_BRIDGE, _INTERFACE, _NETWORK = "bridge0", "eth0", "10.77.0"
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def benchmark(
    *,
    rate: str,
    stages: int,
    tensor_ranks: int,
    sizes: dict[str, int],
    compute_budget: float,
    communication_budget: float,
    repeats: int,
    timeout_seconds: float = 900.0,
) -> dict[str, Any]:
    """Starts the ranks (`slow_links_rank`) in namespaces of their own and returns what rank 0 measured.

    rate: of every link each way, as tc writes it: "100mbit". sizes: of `engines.parallel.Sizes`.
    Raises ConfigError for a rate that is none, LaunchError where namespaces are not permitted or a rank fails.
    """
    bits_per_second(rate)
    job = {
        "rate": rate,
        "stages": stages,
        "tensor_ranks": tensor_ranks,
        "sizes": sizes,
        "compute_budget": compute_budget,
        "communication_budget": communication_budget,
        "repeats": repeats,
    }
    # In a process of its own, because it leaves the machine's network.
    switch = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "analysis.network.slow_links",
            _SWITCH,
            json.dumps(job),
            str(stages * tensor_ranks),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    try:
        shown, faults = switch.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"the ranks did not finish within {timeout_seconds:g} s: fewer repeats, or a faster link"
        ) from None
    finally:
        switch.kill()
    lines = [line for line in shown.splitlines() if line.startswith("{")]
    if switch.returncode or not lines:
        raise LaunchError(faults.strip()[-2000:] or "the ranks ended without a result")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def bits_per_second(rate: str) -> float:
    """Raises ConfigError unless it is a number with kbit, mbit or gbit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if not found:
        raise ConfigError(f"--rate {rate}: write a number with kbit, mbit or gbit, such as 100mbit")
    return float(found[1]) * _UNITS[found[2]]


def why_not_permitted() -> str | None:
    """Why this process cannot make network namespaces; None if it can."""
    tried = subprocess.run(
        [sys.executable, "-c", "from analysis.network.slow_links import new_network; new_network()"],
        capture_output=True,
        text=True,
    )
    return None if tried.returncode == 0 else tried.stderr.strip().splitlines()[-1]


def new_network() -> None:
    """Moves this process into a network namespace of its own, which is empty. Raises LaunchError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NETWORK) != 0:
        why = os.strerror(ctypes.get_errno())
        raise LaunchError(f"no network namespace can be made here ({why}): start it as root")


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def report(result: dict[str, Any], *, as_json: bool) -> str:
    """A line for each plan; with `as_json` the last line is the result as one JSON object."""
    lines = [
        f"{result['pipeline_stages']} pipeline stages x {result['tensor_parallel']} tensor-parallel ranks, "
        f"{result['rate']} links; dense step {result['dense']['step_seconds']:.2f} s, without throttle "
        f"{result['free_dense_seconds']:.2f} s",
        f"{'plan':<10} {'tokens':<11} {'bytes':>8} {'ideal':>7} {'step':>7} {'ideal':>7} {'over ideal':>11}",
    ]
    for name in ("dense", "paper", "makespan"):
        of_plan = result[name]
        over = of_plan["step_ratio"] / of_plan["ideal_step_ratio"]
        lines.append(
            f"{name:<10} {of_plan['token_layout']:<11} {of_plan['bytes_ratio']:>8.3f} "
            f"{of_plan['ideal_bytes_ratio']:>7.3f} {of_plan['step_ratio']:>7.3f} {of_plan['ideal_step_ratio']:>7.3f} "
            f"{over:>11.3f}"
        )
    if as_json:
        lines.append(json.dumps(result))
    return "\n".join(lines)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(f"{' '.join(command)}: {done.stderr.strip()}")


def _in_namespace_of(pid: int, *command: str) -> None:
    _run("nsenter", f"--net=/proc/{pid}/ns/net", *command)


def _join(rank: int, pid: int) -> None:
    """A veth pair between the bridge and the rank's namespace."""
    port = f"port{rank}"
    _run("ip", "link", "add", port, "type", "veth", "peer", "name", _INTERFACE, "netns", str(pid))
    _run("ip", "link", "set", port, "master", _BRIDGE, "up")
    _in_namespace_of(pid, "ip", "link", "set", "lo", "up")
    _in_namespace_of(pid, "ip", "addr", "add", f"{_NETWORK}.{rank + 1}/24", "dev", _INTERFACE)
    _in_namespace_of(pid, "ip", "link", "set", _INTERFACE, "up")


def _throttle(rank: int, pid: int, rate: str) -> None:
    """Both directions of the rank's link; the bucket holds 5 ms, the queue is long enough that nothing is dropped."""
    burst = max(int(bits_per_second(rate) / 8 * 0.005), 20_000)
    bucket = ("tbf", "rate", rate, "burst", str(burst), "limit", str(32_000_000))
    _run("tc", "qdisc", "replace", "dev", f"port{rank}", "root", *bucket)
    _in_namespace_of(pid, "tc", "qdisc", "replace", "dev", _INTERFACE, "root", *bucket)


def _be_switch(job: str, ranks: int) -> int:
    """Holds the bridge, starts the ranks, throttles the links when rank 0 asks for it; prints rank 0's result."""
    new_network()
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", _BRIDGE, "type", "bridge")
    _run("ip", "link", "set", _BRIDGE, "up")
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank-{rank}" for rank in range(ranks)]
        started = [_start_rank(job, rank, ranks, logs[rank]) for rank in range(ranks)]
        try:
            return _attend(started, logs, json.loads(job)["rate"])
        finally:
            for process in started:
                process.kill()


def _start_rank(job: str, rank: int, ranks: int, log: Path) -> subprocess.Popen[str]:
    """It waits for a line on its standard input before it looks for the others."""

    def enter() -> None:
        new_network()
        die_with_parent()

    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": f"{_NETWORK}.1",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": _INTERFACE,
        "OMP_NUM_THREADS": "1",
    }
    launched = {
        name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI", "SLURM"))
    }
    return subprocess.Popen(
        [sys.executable, "-m", "analysis.network.slow_links_rank", job],
        env={**launched, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
        stderr=log.open("w"),
        text=True,
        preexec_fn=enter,
    )


def _attend(ranks: Sequence[subprocess.Popen[str]], logs: Sequence[Path], rate: str) -> int:
    for rank, process in enumerate(ranks):
        _join(rank, process.pid)
    for process in ranks:
        assert process.stdin is not None
        process.stdin.write("joined\n")
        process.stdin.flush()
    assert ranks[0].stdout is not None
    assert ranks[0].stdin is not None
    for line in ranks[0].stdout:
        if line.strip() == "throttle":
            for rank, process in enumerate(ranks):
                _throttle(rank, process.pid, rate)
            ranks[0].stdin.write("throttled\n")
            ranks[0].stdin.flush()
        else:
            print(line, end="", flush=True)
    statuses = [process.wait(timeout=60) for process in ranks]
    for rank, status in enumerate(statuses):
        if status:
            print(f"rank {rank}: {logs[rank].read_text().strip()[-1500:]}", file=sys.stderr)
    return int(any(statuses))


def main() -> int:
    if sys.argv[1:2] == [_SWITCH]:
        try:
            return _be_switch(sys.argv[2], int(sys.argv[3]))
        except LaunchError as error:
            sys.exit(str(error))
    parser = argparse.ArgumentParser(
        prog="slow_links",
        description="Starts its ranks itself, in network namespaces of this machine joined by links of a given rate; "
        "needs root, ip and tc.",
    )
    parser.add_argument("--rate", default="100mbit", help="of every link each way (default: 100mbit)")
    parser.add_argument("--tp", type=whole_number(1), default=4, help="tensor-parallel ranks (default: 4)")
    parser.add_argument("--pp", type=whole_number(1), default=1, help="pipeline stages (default: 1)")
    parser.add_argument("--blocks", type=whole_number(1), default=4)
    parser.add_argument("--heads", type=whole_number(1), default=8, help="of 32 channels")
    parser.add_argument("--micro-batches", type=whole_number(1), default=8)
    parser.add_argument("--samples", type=whole_number(1), default=4, help="of a micro-batch")
    parser.add_argument("--compute-budget", type=share(), default=0.6, help="share of the dense step")
    parser.add_argument("--communication-budget", type=share(), default=0.5, help="share of the dense step")
    parser.add_argument("--repeats", type=whole_number(1), default=3, help="steps of each plan (default: 3)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()

    def run() -> None:
        names = ("blocks", "heads", "micro_batches", "samples")
        result = benchmark(
            rate=options.rate,
            stages=options.pp,
            tensor_ranks=options.tp,
            sizes={**{name: getattr(options, name) for name in names}, "head_size": 32},
            compute_budget=options.compute_budget,
            communication_budget=options.communication_budget,
            repeats=options.repeats,
        )
        print(report(result, as_json=options.json))

    return run_guarded(None, run)


if __name__ == "__main__":
    sys.exit(main())
