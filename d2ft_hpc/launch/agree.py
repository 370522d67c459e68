"""Ranks that fail together: one rank's fault becomes the same error on all ranks, told once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from d2ft_hpc import errors
from d2ft_hpc.errors import UNFINISHED, D2ftError, LaunchError, LostRankError
from d2ft_hpc.launch.control import GRACE_SECONDS, Control, describe_ranks, print_line
from d2ft_hpc.launch.environment import LAUNCHERS, detect, likely_rank
from d2ft_hpc.safe_text import one_line, printable, scrubbed

# Faults of files, networks and input; any other exception is a bug and keeps its traceback.
FAULTS = (D2ftError, OSError, ValueError, RuntimeError)

FAILURE_FILE = "D2FT_FAILURE_FILE"
"""Variable with the path of a file. It gets the message of a run that failed by itself, which no restart would mend.
A launcher that ends all ranks when one fails may return the signal that it ended them with, as if a rank had been
killed.
"""


class AgreedError(Exception):
    """The cause of an error that every rank raises alike, so that rank 0 alone needs to tell it."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__("every rank raises this error; rank 0 tells it")
        self.__cause__ = failure


def is_agreed(error: BaseException) -> bool:
    """Whether every rank raises this error."""
    return isinstance(error.__cause__, AgreedError)


@contextmanager
def agreed(control: Control, what: str) -> Iterator[None]:
    """Run a step on every rank; if it fails on any rank, raise the same error on all of them at its end.

    `what` says what is being done, as in "reading the data set". A D2ftError, OSError, ValueError or
    RuntimeError in the block is exchanged. The error raised has the class of the failures if they share one
    of d2ft_hpc.errors, LaunchError otherwise; its text merges equal messages and names the ranks and hosts.
    Other exceptions pass through on their own rank; `run_guarded` then ends the other ranks.
    """
    failure: Exception | None = None
    try:
        yield
    except LostRankError:
        raise  # nothing can be exchanged any more
    except FAULTS as error:
        if is_agreed(error):
            raise
        failure = error
    envelopes = control.all_gather(b"" if failure is None else _pack(failure))
    if any(envelopes):
        raise _merge(envelopes, control.hosts, what) from AgreedError(failure)


def share(control: Control, make: Callable[[], bytes], what: str) -> bytes:
    """Return on every rank the bytes that `make` computes on rank 0, equal by their SHA-256.

    If `make` raises a D2ftError, OSError, ValueError or RuntimeError, every rank raises the same error, as in
    `agreed`. If a rank holds other bytes than rank 0, every rank raises a LaunchError that names it.
    """
    packed = None
    failure: Exception | None = None
    if control.rank == 0:
        try:
            packed = b"+" + make()
        except FAULTS as error:
            if is_agreed(error):
                raise
            failure = error
            packed = b"-" + _pack(error)
    packed = control.broadcast(packed)
    digests = control.all_gather(hashlib.sha256(packed).digest())
    deviating = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if deviating:
        raise LaunchError(
            f"{what}: {describe_ranks(deviating, control.hosts)} received other bytes than rank 0 sent"
            f" (SHA-256 {digests[deviating[0]].hex()[:12]} instead of {digests[0].hex()[:12]}). Look for a"
            " faulty network, or for different versions of the software on the nodes."
        ) from AgreedError()
    if packed[:1] == b"-":
        envelopes = [packed[1:]] + [b""] * (control.world_size - 1)
        raise _merge(envelopes, control.hosts, what) from AgreedError(failure)
    return packed[1:]


def run_guarded(
    control: Control | None,
    function: Callable[[], int | None],
    *,
    run_folder: Path | None = None,
    before_abort: Callable[[str], None] = lambda message: None,
) -> int:
    """Run a program and return its exit status (None counts as 0), or make all ranks end with one message.

    - A D2ftError that all ranks raised: rank 0 prints `d2ft-hpc: error: ...`; the status is the error's own.
    - A D2ftError of this rank alone: this rank prints it in one line and ends all ranks.
    - Any other exception: a bug. Its traceback goes to `<run_folder>/errors/rank-R.txt`, or to stderr without
      a run folder; then as before. An error that only reports the end of another rank gives that rank and the
      launcher a few seconds to speak first.
    - Ctrl-C: status 130, quietly; with several ranks the process ends here and now.
    Unless the status is 75, the message also goes into the file that `FAILURE_FILE` names. `before_abort` gets it
    before this rank ends the others.
    The control plane is closed at the end, except after Ctrl-C. `control` is None before `connect`: then this
    rank tells its own errors and ends itself. Guards may be nested; the inner one deals with the error.
    """
    try:
        status = function() or 0
        if control is not None:
            control.close()
        return status
    except KeyboardInterrupt:
        if control is not None and control.world_size > 1:
            sys.stdout.flush()
            os._exit(130)  # the threads of gloo and MPI would make a noise at an orderly exit
        return 130
    except D2ftError as error:
        return _tell(control, error, before_abort)
    except Exception as error:
        status = 1
        if control is not None and control.world_size > 1 and _reports_a_lost_rank(error):
            time.sleep(GRACE_SECONDS)
            status = UNFINISHED
        message = f"unexpected {type(error).__name__}: {error}{_save_traceback(control, error, run_folder)}"
        note_failure(message, status)
        if control is None:
            print_line(f"d2ft-hpc: error: {message}")
            return status
        before_abort(message)
        control.abort(message, status)


def note_failure(message: str, status: int = 1) -> None:
    """Writes the file that `FAILURE_FILE` names, if one is named and the status is that of a failure."""
    path = os.environ.get(FAILURE_FILE)
    if path and status != UNFINISHED:
        with suppress(OSError):  # the message is told in any case
            Path(path).write_text(scrubbed(one_line(message)) + "\n", encoding="utf-8")


def _tell(control: Control | None, error: D2ftError, before_abort: Callable[[str], None]) -> int:
    """Print a fault once and return the exit status, or abort if the other ranks do not know of it."""
    rank, world_size = _place(control)
    status = error.exit_status
    note_failure(str(error), status)
    if world_size == 1 or is_agreed(error):
        if rank == 0:
            print_line(f"d2ft-hpc: error: {error}")
        if control is not None:
            with suppress(LaunchError):  # the error has been told; another rank may be gone already
                control.close()
        return status
    if control is not None:
        before_abort(f"error: {error}")
        control.abort(f"error: {error}", status)
    if world_size:
        print_line(f"d2ft-hpc: error: [rank {rank}] {error}")
    else:
        _tell_once_a_host(f"d2ft-hpc: error: {error}")
    return status


def _tell_once_a_host(line: str) -> None:
    """Prints an error that most likely all processes of the launcher have, though they do not know each other yet."""
    named = hashlib.sha256(f"{os.getuid()} {os.getppid()} {line}".encode()).hexdigest()
    with socket.socket(socket.AF_UNIX) as sign:
        try:
            sign.bind(f"\0d2ft-hpc told {named}")
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # another one tells it
                return
        print_line(line)
        if any(os.environ.get(launcher.marker) for launcher in LAUNCHERS.values()):
            time.sleep(GRACE_SECONDS)


def _place(control: Control | None) -> tuple[int, int]:
    """Rank and number of ranks; 0 if it is not known."""
    if control is not None:
        return control.rank, control.world_size
    try:
        environment = detect()
    except LaunchError:  # the very error that is being told, on every rank
        return likely_rank(), 0
    return environment.rank, environment.world_size


def _save_traceback(control: Control | None, error: Exception, run_folder: Path | None) -> str:
    """Write the traceback; return the words that say where it is."""
    text = "".join(traceback.format_exception(error))
    if (path := write_error(run_folder, _place(control)[0], text)) is not None:
        return f" (traceback in {path})"
    print(scrubbed(printable(text)), end="", file=sys.stderr)
    return " (traceback above)"


def write_error(run_folder: Path | None, rank: int, text: str) -> Path | None:
    """Writes the run's errors/rank-R.txt; None without a folder, or on a full or unwritable disk."""
    if run_folder is None:
        return None
    path = run_folder / "errors" / f"rank-{rank}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(scrubbed(printable(text)), encoding="utf-8")
    except OSError:
        return None
    return path


def _reports_a_lost_rank(error: Exception) -> bool:
    """Whether torch.distributed raised this because another rank went away."""
    text = str(error)
    return any(kind.__name__ == "DistError" for kind in type(error).__mro__) or (
        "Connection closed by peer" in text or "Connection reset by peer" in text
    )


def _pack(error: Exception) -> bytes:
    """The name of the error's class in d2ft_hpc.errors ("" if it has none) and its text, as JSON."""
    ours = next((kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__), None)
    text = str(error) if ours else f"{type(error).__name__}: {error}"
    return json.dumps([ours.__name__ if ours else "", text]).encode()


def _merge(envelopes: Sequence[bytes], hosts: Sequence[str], what: str) -> D2ftError:
    """One error from the envelopes [world_size] of all ranks, where b"" means success."""
    ranks_of: dict[str, list[int]] = {}
    kinds = set()
    for rank, envelope in enumerate(envelopes):
        if envelope:
            kind, text = json.loads(envelope)
            kinds.add(kind)
            ranks_of.setdefault(text, []).append(rank)
    if len(hosts) == 1:
        told = "; ".join(ranks_of)
    else:
        told = "; ".join(f"{text} ({describe_ranks(ranks, hosts)})" for text, ranks in ranks_of.items())
    shared: type[D2ftError] = getattr(errors, kinds.pop(), LaunchError) if len(kinds) == 1 else LaunchError
    return shared(f"{what}: {told}")
