"""What libraries do not document and is used all the same is asked for by `expect` and set by `replace`: setting an
attribute that nobody reads raises no error, and a missing number would pass for 1. `tests/private_names.py` lists these
names, and a test checks the list against the installed versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from d2ft_hpc.errors import LibraryError

NEWEST_TESTED = {"torch": "2.14.1", "deepspeed": "0.19.8"}
"""As in tests/constraints.txt."""

DIVIDES_FROM = "0.18.3"
"""The first DeepSpeed whose pipelines divide gradients by the number of micro-batches: to 0.19.2 once in each stage."""
WAITS_FROM = "0.19.8"
"""The first DeepSpeed whose ZeRO 3 waits for each of several gathers."""
PADDING = "round_robin_bit16_padding"
"""The newest ZeRO optimisers' list of what stands after each parameter in a partition."""
SCALER_COUNTERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What a dynamic loss scaler counts."""
SCALE_AT_MINIMUM = "loss scale already at minimum"
"""A part of the message with which a loss scaler gives up."""


def expect(owner: Any, name: str, means: str) -> Any:
    """`owner`'s attribute. Raises LibraryError, with its purpose, if the library no longer has it."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise changed(owner, f"has no {name}, {means}") from None


def replace(owner: Any, name: str, value: Any, means: str) -> None:
    """Puts `value` in place of an attribute that the library reads. Raises LibraryError where it has none."""
    expect(owner, name, means)
    setattr(owner, name, value)


def changed(owner: Any, what: str) -> LibraryError:
    """The error for an object of a library that is not as expected. what: as in "has no x, which ..."."""
    kind = type(owner)
    library = kind.__module__.partition(".")[0]
    tested = NEWEST_TESTED.get(library)
    known = f" {version(library)}" if tested else ""
    fix = f": install {library} {tested} or older, the newest that was tested" if tested else ""
    return LibraryError(f"{library}{known}: {kind.__name__} {what}{fix}")


def newer_than_tested(libraries: Iterable[str]) -> Iterator[str]:
    """A sentence for each of them that is newer than the newest tested one."""
    for library in libraries:
        installed, tested = version(library), NEWEST_TESTED[library]
        if Version(Version(installed).public) > Version(tested):
            yield (
                f"{library} {installed} is newer than {tested}, the newest that was tested: should it fail or train "
                f"otherwise, install that"
            )
