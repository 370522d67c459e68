"""Ranks watch each other while they train: which is gone, which hangs, and where all of them stop together.

Each rank has a thread with a TCP connection to rank 0, which hears a beat of every rank each second (less often
of more than `MOST_BEATS` ranks). It serves:

- Loss. A rank whose connection breaks, or that is silent for `silence_seconds` (stopped, or its node is down), is
  named with its host in one line, and every other rank ends. Rank 0 itself is watched by the others.
- Hanging. If no rank moves on for `stall_seconds`, in whatever phase of the run, from set-up to saving the model, the
  ranks that do not wait in a collective are named and all end. A stop that was asked for waits less: so it ends the run
  in bounded time wherever it hangs.
- Failure. When one rank fails, every other one writes where it was into the run folder before the launcher ends it.
- Agreement on a step boundary, without any cost to the steps: whoever wants to stop or save tells rank 0; that asks
  all ranks to hold at their next boundary and to say how many steps they have begun, takes the largest number, and
  lets them go on to it. Before the first step there is nothing to save: then a stop ends all ranks at once.
"""

from __future__ import annotations

import os
import queue
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from d2ft_hpc.errors import UNFINISHED
from d2ft_hpc.launch.agree import write_error
from d2ft_hpc.launch.channel import Channel, ClosedError, as_line
from d2ft_hpc.launch.children import kill_children
from d2ft_hpc.launch.control import GRACE_SECONDS, Control, describe_ranks, print_line
from d2ft_hpc.launch.links import connect_links
from d2ft_hpc.launch.signals import INTERRUPT, StopSignals
from d2ft_hpc.launch.step_gate import Action, StepGate

BEAT_SECONDS = 1.0
MOST_BEATS = 512
"""That rank 0 hears in a second: of more ranks each beats less often, so that rank 0's own work goes on beside them."""
STOP_SECONDS = 60.0
"""Shortest time that a stop waits for the next step boundary before it counts as a hang; longer if steps are."""

Item = TypeVar("Item")

# Frames of a thread that waits for other ranks.
_WAITING = (
    "torch/distributed",
    "deepspeed/comm",
    *(f"d2ft_hpc/launch/{name}" for name in ("gloo_control", "mpi_control", "watch")),
)


def beat_seconds(ranks: int, silence_seconds: float) -> float:
    """How often each of so many ranks beats: several times within the silence that counts as a loss."""
    return max(BEAT_SECONDS, min(ranks / MOST_BEATS, silence_seconds / 4))


class Watch:
    """Made on all ranks together, after `connect`, in the main thread; a context manager that ends in `close`.

    silence_seconds: a rank that is not heard for so long is lost. stall_seconds: longest time in which no rank moves
    on. run_folder: gets errors/rank-R.txt. signals: those that ask for a stop.
    Raises LaunchError on all ranks if one of them does not reach rank 0.
    """

    def __init__(
        self,
        control: Control,
        *,
        silence_seconds: float = 30.0,
        stall_seconds: float = 600.0,
        run_folder: Path | None = None,
        signals: StopSignals | None = None,
    ) -> None:
        self.control, self._run_folder, self._signals = control, run_folder, signals
        self._silence_seconds, self._stall_seconds = silence_seconds, stall_seconds
        self._beat_seconds = beat_seconds(control.world_size, silence_seconds)
        self._main_thread = threading.get_ident()
        self._gate = StepGate()
        # When the main thread last moved on and in what; how much longer than others that may take; the longest step.
        self._progress, self._phase, self._allowed_seconds = time.monotonic(), "the start", 0.0
        self._longest_seconds = 0.0
        self._stop_asked: float | None = None  # on rank 0: when
        self.reasons: dict[Action, str] = {}
        """The reason why all ranks act at a boundary, such as a signal's name and the rank that got it."""

        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._bell, self._bell_rope = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ, self._do_jobs)
        if signals is not None:
            self._selector.register(signals, selectors.EVENT_READ, self._on_signal)
        self._peers: dict[int, Channel] = {}  # on rank 0 all others, elsewhere rank 0
        self._heard: dict[int, float] = {}
        self._last_tick = self._last_beat = time.monotonic()
        # On rank 0: each rank's age of progress, whether it waits, where it is, and in what phase.
        self._states: dict[int, tuple[float, bool, str, str]] = {}
        # On rank 0: what is to be agreed on, with the reason; the first is under way. Steps begun by rank.
        self._wanted: list[tuple[Action, str]] = []
        self._replies: dict[int, int] = {}
        self._ending = False
        self._undumped: set[int] = set()  # peers that are yet to write where they were
        self._when_dumped: Callable[[], None] = lambda: None
        self._all_dumped = threading.Event()
        self._exit_at = float("inf")
        self._done: set[int] = set()  # ranks that are through
        self._closed = False
        # Nobody watches the ranks while they meet: so they are patient no longer than the watch itself.
        later, control.timeout_seconds = control.timeout_seconds, silence_seconds
        for rank, peer in connect_links(control).items():
            self._peers[rank], self._heard[rank] = peer, time.monotonic()
            self._selector.register(peer, selectors.EVENT_READ, partial(self._receive, rank))
        control.timeout_seconds = later
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    # What the main thread calls.

    def request(self, action: Action, reason: str = "") -> None:
        """Asks that all ranks do this at a step boundary soon."""
        self._do(lambda: self._on_want(self.control.rank, action, reason))

    def at_step_boundary(self, steps_done: int) -> Action | None:
        """What all ranks do at this boundary, before step `steps_done`; each calls it before each of its steps.

        After "save" the step follows; after "stop" and "give up" there is none.
        """
        self._moved_on()
        self.enter("training")
        return self._gate.cross(steps_done)

    def enter(self, phase: str, allowed_seconds: float = 0.0) -> None:
        """The main thread begins with something, named in messages, that ends or moves on within `stall_seconds`.

        allowed_seconds: how much longer it may take.
        """
        self._progress, self._phase, self._allowed_seconds = time.monotonic(), phase, allowed_seconds

    def along(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items. Each one shows that the main thread moves on in a phase that takes longer than a step."""
        for item in items:
            self._moved_on()
            yield item

    def _moved_on(self) -> None:
        now = time.monotonic()
        self._longest_seconds = max(self._longest_seconds, now - self._progress)
        self._progress = now

    def fail(self, message: str) -> None:
        """Tells the other ranks that this one is about to abort, and gives them time to write where they were."""
        if self.control.world_size == 1 or self._closed:
            return
        self._do(lambda: self._announce(message, then=self._all_dumped.set))
        self._all_dumped.wait(GRACE_SECONDS)

    def close(self) -> None:
        """Waits, watched to the last moment, until every rank has come here: then all end at once. Idempotent."""
        if self._closed:
            return
        self._do(self._leave)
        self._thread.join()
        for peer in self._peers.values():
            peer.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The watching thread. Everything below runs in it.

    def _do(self, job: Callable[[], None]) -> None:
        """From another thread: run `job` in the watching one."""
        self._jobs.put(job)
        self._bell_rope.send(b"!")

    def _do_jobs(self) -> None:
        self._bell.recv(64)
        while not self._jobs.empty():
            self._jobs.get()()

    def _run(self) -> None:
        if self._signals is not None:
            self._signals.receive_here()
        while not self._closed:
            for key, _ in self._selector.select(BEAT_SECONDS / 2):
                key.data()
            self._tick()

    def _on_signal(self) -> None:
        assert self._signals is not None
        name = self._signals.caught()
        if name == INTERRUPT:
            self._ending = True  # by Ctrl-C all ranks end, quietly
        elif name is not None:
            self._on_want(self.control.rank, "stop", f"signal {name} to {self._name(self.control.rank)}")

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._last_tick > self._silence_seconds / 2:
            # This process itself was stopped: it can say nothing of the others' silence.
            self._heard = dict.fromkeys(self._heard, now)
            self._progress = now
        self._last_tick = now
        if now > self._exit_at:
            _exit()
        if now - self._last_beat >= self._beat_seconds:
            self._last_beat = now
            for rank in [r for r, heard in self._heard.items() if now - heard > self._silence_seconds]:
                self._lost(
                    rank,
                    f"has been silent for {self._silence_seconds:g} s: it is stopped or its node is down",
                )
            state = self._state(now)
            self._tell_all("beat", *state)
            self._look_for_a_stall(state)

    def _receive(self, rank: int) -> None:
        try:
            messages = self._peers[rank].receive()
        except ClosedError:
            self._lost(rank, "has closed its connection: the process was killed or its node is down")
            return
        self._heard[rank] = time.monotonic()
        for word, *values in messages:
            getattr(self, f"_on_{word}")(rank, *values)

    def _tell_all(self, *message: Any) -> None:
        line = as_line(*message)
        for peer in self._peers.values():
            peer.send_line(line)

    def _name(self, rank: int) -> str:
        return describe_ranks([rank], (*self.control.hosts, ""))

    # Agreement on a boundary.

    def _on_want(self, rank: int, action: Action, reason: str) -> None:
        if self.control.rank != 0:
            self._peers[0].send("want", action, reason)
            return
        if action in (wanted for wanted, _ in self._wanted):
            return
        self._wanted.append((action, reason))
        if action == "stop":
            self._stop_asked = time.monotonic()
        if len(self._wanted) == 1:
            self._begin_round()

    def _begin_round(self) -> None:
        self._replies = {0: self._gate.hold()}
        self._tell_all("hold")
        self._end_round_if_complete()

    def _on_hold(self, rank: int) -> None:
        self._peers[0].send("begun", self._gate.hold())

    def _on_begun(self, rank: int, steps: int) -> None:
        self._replies[rank] = steps
        self._end_round_if_complete()

    def _end_round_if_complete(self) -> None:
        if len(self._replies) <= len(self._peers):  # rank 0's own is one of them
            return
        action, reason = self._wanted.pop(0)
        step = max(self._replies.values())
        if action == "stop" and step == 0:
            self._stop_before_all(reason)
        self._tell_all("at", action, step, reason)
        self._on_at(0, action, step, reason)
        if self._wanted:
            self._begin_round()

    def _on_at(self, rank: int, action: Action, step: int, reason: str) -> None:
        self.reasons[action] = reason
        self._gate.release(action, step)

    def _stop_before_all(self, reason: str) -> NoReturn:
        """No rank has begun a step, and none can: its gate is held."""
        what = f"stopped before the first step by {reason}"
        print_line(f"d2ft-hpc: {what}: start it again with train.resume=auto to go on")
        self._tell_all("exit")
        _exit()

    def _on_exit(self, rank: int) -> NoReturn:
        _exit()

    # Stalls.

    def _state(self, now: float) -> tuple[float, bool, str, str]:
        """Seconds since the main thread moved on, whether it waits for other ranks, where it is, and in what phase."""
        age = max(now - self._progress - self._allowed_seconds, 0.0)
        frame = sys._current_frames().get(self._main_thread)
        if age < min(self._stall_seconds, STOP_SECONDS) / 2 or frame is None:
            return age, False, "", self._phase
        stack = traceback.extract_stack(frame)
        waiting = any(part in entry.filename for entry in stack[-12:] for part in _WAITING)
        return age, waiting, f"{stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name}", self._phase

    def _on_beat(self, rank: int, age: float, waiting: bool, place: str, phase: str) -> None:
        if self.control.rank == 0:
            self._states[rank] = (age, waiting, place, phase)

    def _look_for_a_stall(self, own: tuple[float, bool, str, str]) -> None:
        if self.control.rank != 0 or self._ending:
            return
        states = {**self._states, 0: own}
        age = min(age for age, *_ in states.values())
        limit, why = self._stall_seconds, "launch.stall_seconds"
        if self._stop_asked is not None:
            limit = min(limit, max(STOP_SECONDS, 2 * self._longest_seconds))
            age, why = min(age, time.monotonic() - self._stop_asked), f"after {self._stop_reason()}"
        if age < limit:
            return
        hung = [rank for rank, (_, waiting, *_) in states.items() if not waiting] or list(states)
        phases = " and ".join(sorted({states[rank][3] for rank in hung}))
        places = ", ".join(sorted({states[rank][2] for rank in hung}))
        others = " while the others wait" if len(hung) < len(states) else ""
        self._end(
            f"error: {describe_ranks(hung, self.control.hosts)} hang{'s' if len(hung) == 1 else ''} in {phases}:"
            f" nothing has moved on for {limit:g} s ({why}){others}; at {places}"
        )

    def _stop_reason(self) -> str:
        asked = [reason for action, reason in self._wanted if action == "stop"]
        return asked[0] if asked else self.reasons.get("stop", "a stop")

    # Ends.

    def _lost(self, rank: int, how: str) -> None:
        if rank == 0 and 0 in self._done:
            self._closed = True  # rank 0 was the first to go
            return
        self._drop(rank)
        message = f"error: {self._name(rank)} {how}"
        if self._ending:
            self._on_dumped(rank)
        elif self.control.rank <= 1:
            self._end(message)
        else:
            self._ending = True
            self._dump(message)
            time.sleep(GRACE_SECONDS)  # rank 1 speaks, unless it went with rank 0
            self._end(message)

    def _end(self, message: str) -> None:
        """This rank found out that the job cannot go on: it says so and ends all."""
        print_line(f"[{self._name(self.control.rank)}] {message}")
        self._dump(message)
        self._exit_at = time.monotonic() + GRACE_SECONDS / 3
        self._announce(message, then=_exit)

    def _announce(self, message: str, then: Callable[[], None]) -> None:
        """Tells all peers, which write where they were, and does `then` when they have."""
        self._tell_end(f"[{self._name(self.control.rank)}] {message}", set(self._peers), then)

    def _tell_end(self, message: str, ranks: set[int], then: Callable[[], None]) -> None:
        self._ending, self._undumped, self._when_dumped = True, ranks, then
        line = as_line("end", message)
        for rank in ranks:
            self._peers[rank].send_line(line)
        if not ranks:
            then()

    def _on_end(self, teller: int, message: str) -> None:
        if self._ending:
            return
        self._exit_at = time.monotonic() + 2 * GRACE_SECONDS  # if no launcher ends this process
        self._dump(message)
        self._tell_end(message, set(self._peers) - {teller}, then=lambda: self._answer(teller))

    def _answer(self, teller: int) -> None:
        if teller in self._peers:
            self._peers[teller].send("dumped")

    def _on_dumped(self, rank: int) -> None:
        if rank in self._undumped:
            self._undumped.remove(rank)
            if not self._undumped:
                self._when_dumped()

    def _dump(self, message: str) -> None:
        frame = sys._current_frames().get(self._main_thread)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        text = f"ended by: {message}\nthis rank was here:\n{stack}"
        write_error(self._run_folder, self.control.rank, text)

    def _leave(self) -> None:
        self._on_done(self.control.rank)
        if self.control.rank != 0:
            self._peers[0].send("done")

    def _on_done(self, rank: int) -> None:
        """Rank 0 collects all ranks, then tells all."""
        self._done.add(rank)
        if self.control.rank != 0:
            self._closed = rank == 0
        elif len(self._done) > len(self._peers):  # rank 0 is one of them
            self._tell_all("done")
            self._closed = True

    def _drop(self, rank: int) -> None:
        self._selector.unregister(self._peers[rank])
        self._peers.pop(rank).close()
        del self._heard[rank]
        self._states.pop(rank, None)


def _exit() -> NoReturn:
    """Ends this process at once, wherever its main thread is."""
    kill_children()
    os._exit(UNFINISHED)
