"""All ranks act before the same step, whatever the order in which their gates are held."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time

import pytest

from d2ft_hpc.launch.step_gate import StepGate
from d2ft_hpc.launch.watch import beat_seconds

RANKS, STEPS = 4, 60


@pytest.mark.parametrize("seed", range(20))
def test_ranks_in_lock_step_stop_at_the_same_boundary(seed: int) -> None:
    choice = random.Random(seed)
    gates = [StepGate() for _ in range(RANKS)]
    all_reduce = threading.Barrier(RANKS, timeout=10)
    pauses = [[choice.random() * 1e-3 for _ in range(STEPS)] for _ in range(RANKS)]
    stopped: dict[int, int] = {}
    saved: dict[int, list[int]] = {rank: [] for rank in range(RANKS)}

    def train(rank: int) -> None:
        for step in range(STEPS):
            action = gates[rank].cross(step)
            if action == "stop":
                stopped[rank] = step
                return
            if action == "save":
                saved[rank].append(step)
            time.sleep(pauses[rank][step])
            all_reduce.wait()

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for action in ("save", "stop"):
        time.sleep(choice.random() * 0.01)
        begun = []
        for rank in choice.sample(range(RANKS), RANKS):
            begun.append(gates[rank].hold())
            time.sleep(choice.random() * 2e-3)
        for rank in choice.sample(range(RANKS), RANKS):
            gates[rank].release(action, max(begun))
            time.sleep(choice.random() * 2e-3)
    for thread in threads:
        thread.join(10)
    assert len(stopped) == RANKS
    assert len(set(stopped.values())) == 1
    assert all(saves == saved[0] for saves in saved.values())
    # A stop at the boundary of the save wins: the stop saves too.
    assert len(saved[0]) == 1 or stopped[0] <= max(saved[0], default=STEPS)


def test_what_was_asked_before_the_first_step_is_due_at_it() -> None:
    gate = StepGate()
    gate.release("stop", gate.hold())
    assert gate.cross(17) == "stop"


def test_of_many_ranks_each_beats_less_often_but_within_the_silence_that_counts_as_a_loss() -> None:
    assert [beat_seconds(ranks, 30.0) for ranks in (2, 512, 1024, 4096, 10**6)] == [1.0, 1.0, 2.0, 7.5, 7.5]
    assert beat_seconds(4096, 2.0) == 1.0


def test_what_watches_the_ranks_needs_no_torch() -> None:
    """A rank that only watches, or that MPI starts before torch is loaded, stays small."""
    code = "import sys, d2ft_hpc.launch.watch; assert not {'torch', 'numpy'} & {*sys.modules}"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
